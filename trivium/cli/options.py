"""Options that several verbs share."""

from pathlib import Path

import click

recipe_argument = click.argument("recipe")
runs_option = click.option("--runs", default="runs", show_default=True, help="The folder of results.")
set_option = click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change a setting: base.tokens=2M."
)
only_option = click.option(
    "--only", multiple=True, metavar="STAGE", help="This stage and the stages it needs."
)
unsafe_option = click.option(
    "--unsafe-sandbox",
    is_flag=True,
    help="Run programs that a model wrote even where the kernel cannot isolate them.",
)
AT_LEAST_ONE = click.IntRange(min=1)


def write(text: str, path: Path | None) -> None:
    """Write a text to a file, or print it where no file is named."""
    from trivium.kit.files import write_text

    if path is None:
        click.echo(text, nl=False)
    else:
        write_text(path, text)
        click.echo(f"Wrote {path}.")
