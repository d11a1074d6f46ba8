"""The verbs; each parses its words and makes one call below."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from trivium import __version__
from trivium.kit.errors import TriviumError
from trivium.kit.files import BARRED, FAILING
from trivium.kit.table import print_table
from trivium.serve.command import chat, serve

_HELP = {"help_option_names": ["-h", "--help"], "max_content_width": 100}
_recipe = click.argument("recipe")
_runs = click.option("--runs", default="runs", show_default=True, help="Where results lie.")
_set = click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change a setting: base.tokens=2M."
)
_unsafe = click.option(
    "--unsafe-sandbox",
    is_flag=True,
    help="Run programs that a model wrote even where the kernel cannot isolate them.",
)
_AT_LEAST_ONE = click.IntRange(min=1)
_only = click.option("--only", multiple=True, metavar="STAGE", help="This stage and the stages it needs.")


@click.group(context_settings=_HELP)
@click.version_option(__version__, prog_name="trivium")
def cli() -> None:
    """A language model's whole education: pre-training, mid-training, post-training, and what each did.

    RECIPE is a YAML file or the name of one that ships, such as `laptop`.
    """


@cli.command()
@_recipe
@_runs
@_only
@_set
@click.option("--wait/--no-wait", default=True, help="Wait for another process that makes the same stage.")
@_unsafe
def run(
    recipe: str,
    runs: str,
    only: tuple[str, ...],
    overrides: tuple[str, ...],
    wait: bool,
    unsafe_sandbox: bool,
) -> None:
    """Run a recipe: reuse what is done, resume what was cut off, run the rest."""
    from trivium.pipeline.run import run, table

    going = run(recipe, runs, overrides, only, wait, unsafe_sandbox)
    if going.became:
        print_table(table(going))
    if going.concluded:
        from trivium.lab.experiments import tables

        for rows in tables(going.concluded):
            click.echo()
            print_table(rows)
        click.echo(f"\nThe page: {Path(runs) / going.recipe.name / 'experiment.html'}")
    if going.reported:
        page, rows = going.reported
        if rows:
            click.echo()
            print_table(rows)
        click.echo(f"\nThe page: {page}")


@cli.command()
@_recipe
@_runs
@_only
@_set
def plan(recipe: str, runs: str, only: tuple[str, ...], overrides: tuple[str, ...]) -> None:
    """Say what a run would do and roughly what it would cost."""
    from trivium.pipeline.plan import plan

    print_table(plan(recipe, runs, overrides, only))


@cli.command()
@click.argument("recipe", required=False)
@_runs
def status(recipe: str | None, runs: str) -> None:
    """Show how far every stage is."""
    from trivium.pipeline.status import rows

    print_table(rows(runs, recipe))


@cli.command()
@click.argument("recipe", required=False)
@_runs
@click.option("--port", default=8321, show_default=True, type=click.IntRange(1, 65535))
def watch(recipe: str | None, runs: str, port: int) -> None:
    """Show a run while it goes on, on a page of this machine; without RECIPE the newest."""
    from trivium.pipeline.watch import watch

    watch(runs, recipe, port, say=click.echo)


@cli.command()
@click.argument("stage")
@_runs
@click.option("--step", type=int, help="Name the documents this optimiser step learnt from.")
@click.option("--batch", is_flag=True, help="Print a packed batch (of --step, else the first), coloured.")
def show(stage: str, runs: str, step: int | None, batch: bool) -> None:
    """Show a stage's settings, summary and changes; STAGE is `base`, `laptop/base` or a folder."""
    from trivium.pipeline import show

    entry = show.find(runs, stage)
    if batch:
        click.echo(show.batch(entry, step or 1, colour=sys.stdout.isatty()))
        return
    click.echo(show.text(entry) if step is None else "\n".join(show.documents(entry, step)))


@cli.command()
@_runs
@click.option("--yes", is_flag=True, help="Remove; without it, only say what would be removed.")
def gc(runs: str, yes: bool) -> None:
    """Remove results that no recipe reaches any more."""
    from trivium.pipeline.store import Store, size

    if not Path(runs).is_dir():
        raise TriviumError(f"there is no folder {runs}; name the one that holds results with --runs.")
    store = Store(Path(runs))
    gone = store.unreached()
    for entry in gone:
        click.echo(
            f"{'removed' if yes else 'would remove'} {entry.folder} ({size(entry.folder) / 2**20:.1f} MiB)"
        )
        if yes:
            store.remove(entry)
    if not gone:
        click.echo("Every result is reached by a recipe; there is nothing to remove.")
    elif not yes:
        click.echo("Nothing was removed; say `trivium gc --yes` to do it.")


@cli.command()
@click.option("--to", type=click.Path(dir_okay=False, path_type=Path), help="A file; else standard output.")
@click.option("--markdown", is_flag=True, help="Tables of all settings instead, as in docs/settings.md.")
def schema(to: Path | None, markdown: bool) -> None:
    """Write the JSON schema of recipes, from which editors complete and check."""
    import json

    from trivium.recipe.reference import reference
    from trivium.recipe.schema import json_schema

    _write(reference() if markdown else json.dumps(json_schema(), indent=2) + "\n", to)


@cli.command()
@click.argument("path", default="recipe.yaml", type=click.Path(dir_okay=False, path_type=Path))
def init(path: Path) -> None:
    """Write a starter recipe to PATH."""
    if path.exists():
        raise TriviumError(f"{path} is there already; name another file.")
    starter = Path(__file__).parent / "recipe" / "starter.yaml"
    _write(starter.read_text(encoding="utf-8"), path)
    click.echo(f"Put texts into {path.parent / 'texts'}, then: trivium plan {path}; trivium run {path}")


@cli.command()
@_recipe
@_runs
@click.option("--on", "target", required=True, type=click.Choice(["torchrun", "slurm", "sky"]), help="Where.")
@click.option("--nodes", default=1, show_default=True, type=_AT_LEAST_ONE, help="Machines.")
@click.option(
    "--processes", default=8, show_default=True, type=_AT_LEAST_ONE, help="Processes (GPUs) on each machine."
)
@click.option("--to", type=click.Path(dir_okay=False, path_type=Path), help="A file; else standard output.")
def launch(recipe: str, runs: str, target: str, nodes: int, processes: int, to: Path | None) -> None:
    """Write the script that runs a recipe on other machines; submitting it is up to you."""
    from trivium.pipeline.launch import script

    _write(script(recipe, target, runs, nodes, processes), to)


@cli.command()
@_runs
def doctor(runs: str) -> None:
    """Measure this machine and say what of it will be used."""
    from trivium.pipeline.doctor import rows

    for name, value in rows(runs):
        click.echo(f"{name:<18}{value}")


cli.add_command(chat)
cli.add_command(serve)


@cli.command("eval")
@click.argument("model")
@click.option("--tasks", required=True, help="Names with their options: facts,sums?steps_high=3&samples=8.")
@click.option("--limit", default=200, show_default=True, help="Questions per task.")
@click.option("--shots", default=0, show_default=True, help="Answered examples before each question.")
@click.option("--samples", default=0, show_default=True, help="Answers drawn per question, for pass@k.")
@click.option("--style", type=click.Choice(["auto", "continue", "chat"]), default="auto", show_default=True)
@click.option("--chain-of-thought/--at-once", default=True, help="Whether sums may be worked out in writing.")
@click.option(
    "--reasoning",
    type=click.Choice(["off", "ask", "open"]),
    default="off",
    show_default=True,
    help="Whether sums ask for thoughts before the answer.",
)
@click.option("--seed", default=0, show_default=True)
@click.option("--json", "to", type=click.Path(path_type=Path), help="Write the numbers here, answers beside.")
@click.option("--against", type=click.Path(path_type=Path), help="Compare with what --json wrote before.")
@_unsafe
def eval_(
    model: str, tasks: str, to: Path | None, against: Path | None, unsafe_sandbox: bool, **asking: Any
) -> None:
    """Ask a model tasks whose truth is known; every number comes with n and a 95 % interval."""
    from trivium.api import model_folder
    from trivium.evals import command
    from trivium.evals.results import Results
    from trivium.evals.settings import settings_of
    from trivium.grade.sandbox.client import announced, permitting_unsafe
    from trivium.model.hub import resolve

    folder = model_folder(resolve(model))
    settings = settings_of("trivium eval", asking)
    before = None if against is None else Results.load(against)
    if to is not None and to.is_dir():
        raise TriviumError(f"{to} is a folder; name a file for the numbers.")
    say = lambda line: click.echo(line, err=True)
    with announced(say), permitting_unsafe(unsafe_sandbox):
        results = command.evaluate_folder(folder, tasks.split(","), settings, name=model, say=say)
    print_table(results.table())
    if to is not None:
        results.save(to)
        click.echo(f"Wrote {to} and every answer beside it.")
    if before is not None:
        print_table(command.against(results, before))


@cli.command()
@click.argument("models", nargs=-1, required=True)
@_runs
@click.option(
    "--on", "tasks", help="What to ask: sums?samples=8,instructions; else what fits the models' data."
)
@click.option("--limit", default=100, show_default=True, help="Questions per task.")
@click.option("--seed", default=0, show_default=True)
@click.option(
    "--html", "to", type=click.Path(path_type=Path), help="The page; else compare.html under --runs."
)
def compare(
    models: tuple[str, ...], runs: str, tasks: str | None, limit: int, seed: int, to: Path | None
) -> None:
    """Ask models the same things and show side by side what each can do; writes one HTML page.

    MODELS are stages (`sft`, `laptop/sft`), Hugging Face folders, or ids on the hub, in the order they grew.
    """
    from trivium.evals.settings import settings_of
    from trivium.lab.compare import compare, summary_table

    settings = settings_of("trivium compare", {"limit": limit, "seed": seed})
    place = to or Path(runs) / "compare.html"
    say = lambda line: click.echo(line, err=True)
    on = tasks.split(",") if tasks else []
    print_table(summary_table(compare(models, runs=Path(runs), to=place, on=on, settings=settings, say=say)))
    click.echo(f"Wrote {place}, and {place.with_suffix('.json')} with everything it shows.")


@cli.command()
@click.argument("models", nargs=-1, required=True)
@_runs
@click.option(
    "--prompts", type=click.Path(path_type=Path), help="A line each; the first model goes on from them."
)
@click.option("--count", default=24, show_default=True, help="Texts of a kind, where no prompts are given.")
@click.option("--seed", default=0, show_default=True)
@click.option("--json", "to", type=click.Path(path_type=Path), help="Write every token's divergence here.")
def distance(
    models: tuple[str, ...], runs: str, prompts: Path | None, count: int, seed: int, to: Path | None
) -> None:
    """How far models' next-token distributions lie from the first one's, in nats per token."""
    from trivium.lab.distance import distance

    print_table(distance(models, runs=Path(runs), prompts=prompts, count=count, seed=seed, to=to))


@cli.command(add_help_option=False, context_settings={"ignore_unknown_options": True})
@click.argument("words", nargs=-1, type=click.UNPROCESSED)
def grade(words: tuple[str, ...]) -> None:
    """Score a text: mathematics, steps, code, SQL, format, instructions."""
    from trivium.grade.command import grade

    grade.main(list(words), prog_name="trivium grade", standalone_mode=False)


def _write(text: str, path: Path | None) -> None:
    from trivium.kit.files import write_text

    if path is None:
        click.echo(text, nl=False)
    else:
        write_text(path, text)
        click.echo(f"Wrote {path}.")


def main(arguments: Sequence[str] | None = None) -> None:
    """The command `trivium`: what a person can fix ends in one sentence and exit status 2."""
    try:
        cli.main(arguments, prog_name="trivium", standalone_mode=False)
    except TriviumError as error:
        click.echo(f"trivium: {error}", err=True)
        sys.exit(2)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        click.echo("trivium: stopped; the same command goes on from here.", err=True)
        sys.exit(130)
    except OSError as error:
        if error.errno not in BARRED | FAILING or error.filename is None:
            raise
        click.echo(
            f"trivium: {error.filename} cannot be opened: {error.strerror}; fix that or name another.",
            err=True,
        )
        sys.exit(2)


if __name__ == "__main__":
    main()
