"""The verbs before a run: init, data, schema, launch, doctor."""

from pathlib import Path

import click

from trivium.cli.options import AT_LEAST_ONE, recipe_argument, runs_option, write
from trivium.kit.errors import TriviumError
from trivium.kit.table import print_table


@click.command()
@click.option("--to", type=click.Path(dir_okay=False, path_type=Path), help="A file; else standard output.")
@click.option("--markdown", is_flag=True, help="Tables of all settings instead, as in docs/settings.md.")
def schema(to: Path | None, markdown: bool) -> None:
    """Write the JSON schema of recipes, from which editors complete and check."""
    import json

    from trivium.recipe.reference import reference
    from trivium.recipe.schema import json_schema

    write(reference() if markdown else json.dumps(json_schema(), indent=2) + "\n", to)


@click.command()
@click.argument("path", default="recipe.yaml", type=click.Path(dir_okay=False, path_type=Path))
@runs_option
@click.option("--template", help="pretrain, midtrain, sft, lora, dpo, rlvr, full-road, long-context, ...")
@click.option("--data", help="What it is filled in for: a file, folder or data set.")
@click.option("--chats", help="Conversations, for templates that need texts and conversations.")
@click.option("--model", help="What it starts from: a stage, a folder or an id on the hub.")
@click.option("--example", is_flag=True, help="Also write small texts and chats, on which the starter runs.")
def init(
    path: Path,
    runs: str,
    template: str | None,
    data: str | None,
    chats: str | None,
    model: str | None,
    example: bool,
) -> None:
    """Write a recipe to PATH: a starter, or a template filled in for your data."""
    from trivium.pipeline import starting

    if path.exists():
        raise TriviumError(f"{path} is there already; name another file.")
    if template is None:
        if data or chats or model:
            raise TriviumError(f"Name a --template to fill in: {', '.join(starting.templates())}.")
        text = starting.STARTER.read_text(encoding="utf-8")
    else:
        text = starting.filled(template, path, data, model, runs, chats)
    if example:
        for place in starting.with_examples(path.parent):
            click.echo(f"Wrote {place}.")
    write(text, path)
    needed = f"Put texts into {path.parent / 'texts'} and chats into {path.parent / 'chats.jsonl'}, then: "
    needed = "" if example or template else needed
    click.echo(f"{needed}trivium plan {path}; trivium run {path}")


@click.command()
@recipe_argument
@runs_option
@click.option("--on", "target", required=True, type=click.Choice(["torchrun", "slurm", "sky"]), help="Where.")
@click.option("--nodes", default=1, show_default=True, type=AT_LEAST_ONE, help="Machines.")
@click.option(
    "--processes", default=8, show_default=True, type=AT_LEAST_ONE, help="Processes (GPUs) on each machine."
)
@click.option("--jobs", type=AT_LEAST_ONE, help="A SLURM array of so many tasks that share the stages.")
@click.option("--to", type=click.Path(dir_okay=False, path_type=Path), help="A file; else standard output.")
def launch(
    recipe: str, runs: str, target: str, nodes: int, processes: int, jobs: int | None, to: Path | None
) -> None:
    """Write the script that runs a recipe on other machines; submitting it is up to you."""
    from trivium.pipeline.launch import script

    write(script(recipe, target, runs, nodes, processes, jobs), to)


@click.command()
@runs_option
def doctor(runs: str) -> None:
    """Measure this machine and say what of it will be used."""
    from trivium.pipeline.doctor import rows

    for name, value in rows(runs):
        click.echo(f"{name:<18}{value}")


@click.command()
@click.argument("source")
@runs_option
@click.option("--model", help="Count with this model's tokenizer and render with its chat template.")
@click.option("--split", help="Which split of a data set.")
@click.option("--limit", type=AT_LEAST_ONE, help="Read at most so many rows.")
def data(source: str, runs: str, model: str | None, split: str | None, limit: int | None) -> None:
    """Show what a file, folder or data set holds: format, columns, lengths, and a row as it is learned."""
    import sys

    from trivium.pipeline.preview import preview

    colour = sys.stdout.isatty()
    rows, example = preview(source, model=model, runs=runs, split=split, limit=limit, colour=colour)
    print_table(rows)
    click.echo(f"\nThe first row, what is learned {'in colour' if colour else 'between ⟦ and ⟧'}:\n{example}")
