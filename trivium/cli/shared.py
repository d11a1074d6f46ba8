"""The verbs about a store that several machines share: push, pull."""

import click

from trivium.cli.options import only_option, recipe_argument, runs_option, set_option
from trivium.kit.table import print_table

url_argument = click.argument("url")


@click.command()
@recipe_argument
@url_argument
@runs_option
@only_option
@set_option
def push(recipe: str, url: str, runs: str, only: tuple[str, ...], overrides: tuple[str, ...]) -> None:
    """Copy a recipe's finished results to the store at URL (file://, s3://, gs://, ssh://)."""
    from trivium.pipeline.transfer import push

    print_table(push(recipe, url, runs, overrides, only))


@click.command()
@recipe_argument
@url_argument
@runs_option
@only_option
@set_option
def pull(recipe: str, url: str, runs: str, only: tuple[str, ...], overrides: tuple[str, ...]) -> None:
    """Copy what the store at URL has of a recipe to this machine."""
    from trivium.pipeline.transfer import pull

    print_table(pull(recipe, url, runs, overrides, only))
