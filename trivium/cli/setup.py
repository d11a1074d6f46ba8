"""The verbs before a run: init, data, schema, launch, doctor."""

from pathlib import Path
from typing import Any

import click

from trivium.cli.options import AT_LEAST_ONE, only_option, recipe_argument, runs_option, set_option, write
from trivium.kit.errors import TriviumError
from trivium.kit.table import hanging, print_table


@click.command()
@click.argument("recipe", required=False)
@click.option("--to", type=click.Path(dir_okay=False, path_type=Path), help="A file; else standard output.")
@click.option("--markdown", is_flag=True, help="Tables of all settings instead, as in docs/settings.md.")
def schema(recipe: str | None, to: Path | None, markdown: bool) -> None:
    """Write the JSON schema of recipes, from which editors complete and check.

    With a RECIPE, its kinds in files (`kind: mine.py:Name`) are in the schema.
    """
    import json

    from trivium.recipe.reference import reference
    from trivium.recipe.schema import json_schema, load

    if recipe is not None:
        load(recipe)
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
    needed = "Next: " if example or template else needed
    click.echo(f"{needed}trivium plan {path}; trivium run {path}")


@click.command()
@recipe_argument
@runs_option
@only_option
@set_option
@click.option(
    "--on", "target", required=True, type=click.Choice(["torchrun", "slurm", "sky", "ray"]), help="Where."
)
@click.option("--nodes", default=1, show_default=True, type=AT_LEAST_ONE, help="Machines.")
@click.option(
    "--processes", default=8, show_default=True, type=AT_LEAST_ONE, help="Processes (GPUs) on each machine."
)
@click.option(
    "--cpus", default=8, show_default=True, type=AT_LEAST_ONE, help="Processor cores for each process."
)
@click.option("--gpus/--no-gpus", default=True, help="Whether each process has a GPU.")
@click.option("--jobs", type=AT_LEAST_ONE, help="A SLURM array of so many tasks that share the stages.")
@click.option("--time", default="24:00:00", show_default=True, help="The time limit of a SLURM job.")
@click.option("--grace", default="5m", show_default=True, help="Save and stop so long before the limit.")
@click.option(
    "--restarts",
    default=3,
    show_default=True,
    type=click.IntRange(min=0),
    help="How often torchrun starts all processes again when one fails.",
)
@click.option("--sbatch", "directives", multiple=True, metavar="OPTION", help="Of sbatch: --partition=gpu.")
@click.option("--accelerator", default="H100", show_default=True, help="The GPU that SkyPilot looks for.")
@click.option("--bucket", help="SkyPilot keeps the runs in this bucket: s3://mine, gs://mine or a name.")
@click.option("--volume", help="SkyPilot keeps the runs on this volume, which all machines see.")
@click.option("--print", "only_print", is_flag=True, help="Print the script; submit nothing.")
@click.option(
    "--to", type=click.Path(dir_okay=False, path_type=Path), help="Write it to a file; submit nothing."
)
def launch(
    recipe: str,
    runs: str,
    only: tuple[str, ...],
    overrides: tuple[str, ...],
    target: str,
    only_print: bool,
    to: Path | None,
    **wishes: Any,
) -> None:
    """Render the script that runs a recipe under a scheduler, and submit it."""
    from trivium.pipeline.launch import script, submit

    more = [word for name in only for word in ("--only", name)]
    more += [word for one in overrides for word in ("--set", one)]
    text = script(recipe, target, runs, more=more, **wishes)
    if only_print or to is not None:
        write(text, to)
    else:
        click.echo(submit(text, target, recipe, runs))


@click.command()
@runs_option
@click.option(
    "--nodes", is_flag=True, help="One line for each machine of a torchrun instead; names slow ones."
)
def doctor(runs: str, nodes: bool) -> None:
    """Measure this machine and say what of it will be used."""
    if nodes:
        from trivium.pipeline.nodes import check_nodes

        check = check_nodes()
        for line in check.lines() if check is not None else ():
            click.echo(line)
        return
    from trivium.pipeline.doctor import rows

    for name, value in rows(runs):
        click.echo(hanging(f"{name:<18}{value}", 18))


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
