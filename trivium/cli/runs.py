"""The verbs about recipes and their results: run, plan, status, ls, watch, show, gc."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from trivium.cli.options import (
    AT_LEAST_ONE,
    only_option,
    recipe_argument,
    runs_option,
    set_option,
    unsafe_option,
)
from trivium.kit.errors import TriviumError
from trivium.kit.table import paragraph, print_table


@click.command()
@recipe_argument
@runs_option
@only_option
@set_option
@click.option("--wait/--no-wait", default=True, help="Wait for another process that makes the same stage.")
@click.option("--store", metavar="URL", help="A shared store: pull what it has, push what is made.")
@click.option("--jobs", type=AT_LEAST_ONE, help="Make so many stages side by side, one process or GPU each.")
@click.option(
    "--stop-after", metavar="TIME", help="Save and stop after 90m or 24:00:00: exit status 75, go on."
)
@click.option("--stop-file", metavar="PATH", help="Save and stop once this file appears.")
@click.option(
    "--check-nodes",
    is_flag=True,
    envvar="TRIVIUM_CHECK_NODES",
    help="Measure every machine first, and name slow ones.",
)
@unsafe_option
def run(
    recipe: str,
    runs: str,
    only: tuple[str, ...],
    overrides: tuple[str, ...],
    wait: bool,
    store: str | None,
    jobs: int | None,
    stop_after: str | None,
    stop_file: str | None,
    check_nodes: bool,
    unsafe_sandbox: bool,
) -> None:
    """Run a recipe: reuse what is done, resume what was cut off, run the rest."""
    from trivium.kit import stopping
    from trivium.pipeline.jobs import crew

    stopping.ask(stop_after, stop_file)
    # These get ready during the imports below, which take seconds.
    with stopping.terminable(), crew(jobs) as workers:
        from trivium.kit.processes import world
        from trivium.pipeline.plan import keep_plan
        from trivium.pipeline.run import run, table

        if check_nodes:
            from trivium.pipeline import nodes

            check = nodes.check_nodes()
            for line in check.lines() if check is not None else ():
                click.echo(line, err=True)
        # Several processes plan together how to share the work.
        if world().size == 1:
            keep_plan(recipe, runs, overrides, only)
        prepared = run(recipe, runs, overrides, only, wait, unsafe_sandbox, store, jobs, workers)
    if prepared.became:
        print_table(table(prepared))
        if set(prepared.became.values()) == {"reused"}:
            click.echo(f"\n{prepared.recipe.name} is already complete: every stage was done before.")
    if prepared.concluded:
        from trivium.lab.experiments import tables

        for rows in tables(prepared.concluded):
            click.echo()
            print_table(rows)
        click.echo(f"\nThe page: {Path(runs) / prepared.recipe.name / 'experiment.html'}")
    if prepared.reported:
        page, rows = prepared.reported
        if rows:
            click.echo()
            print_table(rows)
            explain(rows)
        click.echo(f"\nThe page: {page}")
        made = [name for name, node in prepared.nodes.items() if node.stage.produces == "model"]
        if made:
            next_commands(f"{prepared.recipe.name}/{made[-1]}", runs)


def next_commands(stage: str, runs: str, produces: str = "model") -> None:
    """Say what can be done with a finished stage: talk to it where it is a model, and look at it."""
    where = "" if runs == "runs" else f" --runs {runs}"
    click.echo("\nTry next:")
    for verb in ("chat", "serve", "show") if produces == "model" else ("show",):
        click.echo(f"  trivium {verb} {stage}{where}")


def explain(rows: list[list[str]]) -> None:
    """Say what a number of the final table means that looks at odds with the one beside it."""
    if any(row[0].endswith("effective context") for row in rows):
        click.echo(
            "\neffective context: the longest length up to which 90 % of the pass keys are found at every\n"
            "length asked; 0 where the shortest already falls below that, whatever the longer ones reach."
        )


@click.command()
@recipe_argument
@runs_option
@only_option
@set_option
@click.option("--why", is_flag=True, help="Say field by field why a stage would run again.")
@click.option("--on", help="A machine of the catalogue and how many: h100:8; else this one, as measured.")
@click.option(
    "--machines",
    type=click.Path(path_type=Path, dir_okay=False),
    help="A file of machines and prices of your own.",
)
@click.option("--json", "as_json", is_flag=True, help="Print every number as JSON.")
@click.option("--compare", "other", help="Print another recipe's plan beside it.")
@click.option("--sweep", help="Plan for several values of one setting: context=2k,8k,32k.")
def plan(
    recipe: str,
    runs: str,
    only: tuple[str, ...],
    overrides: tuple[str, ...],
    why: bool,
    on: str | None,
    machines: Path | None,
    as_json: bool,
    other: str | None,
    sweep: str | None,
) -> None:
    """Look at settings, data and machine: what a run would do, cost and refuse."""
    import json

    from trivium.pipeline.plan import planned
    from trivium.pipeline.plan_tables import machine_table, side_by_side, swept

    wishes: dict[str, Any] = {"only": only, "on": on, "machines": machines}
    if sweep is not None or other is not None:
        if sweep is not None and other is not None:
            raise TriviumError("say one of --sweep and --compare: each prints a table of its own.")
        plans = (
            swept(recipe, runs, overrides, sweep, **wishes)
            if sweep is not None
            else {
                one: planned(one, runs, overrides, **wishes) for one in dict.fromkeys([recipe, other or ""])
            }
        )
        if as_json:
            click.echo(json.dumps({name: one.as_json() for name, one in plans.items()}, indent=2))
        else:
            print_table(side_by_side(plans))
        return
    found = planned(recipe, runs, overrides, **wishes)
    if as_json:
        click.echo(json.dumps(found.as_json(), indent=2))
        return
    if on is not None:
        print_table(machine_table(found))
        click.echo()
    reasons_of = None
    if why:
        from trivium.pipeline.why import reasons

        reasons_of = reasons
    print_plan(found, reasons_of)


def print_plan(found: Any, reasons_of: Callable[..., list[str]] | None = None) -> None:
    """The plan's table, the numbers of every stage, why it runs where that is asked, and the notes."""
    print_table([row[:4] for row in found.rows])
    click.echo()
    for name, *_, numbers in found.rows[1:]:
        if numbers:
            click.echo(paragraph(f"{name}: {numbers}"))
    if reasons_of is not None:
        click.echo()
        for name in found.numbers:
            for reason in reasons_of(found.prepared, name):
                click.echo(paragraph(f"{name}: {reason}"))
    for one in found.estimates:
        for sentence in one.job.advice:
            click.echo(paragraph(f"{one.job.stage}: {sentence}"))
    for note in found.notes:
        click.echo("\n" + paragraph(f"Note: {note}."))


@click.command()
@click.argument("recipe", required=False)
@runs_option
def status(recipe: str | None, runs: str) -> None:
    """Show how far every stage is."""
    from trivium.pipeline.status import last_steps, rows

    print_table(rows(runs, recipe))
    for line in last_steps(runs, recipe):
        click.echo("\n" + paragraph(line))


@click.command("ls")
@click.argument("recipe", required=False)
@runs_option
@click.option("--cost", is_flag=True, help="Show time, FLOPs, disk and money instead, with their sums.")
@click.option("--price", type=click.FloatRange(min=0), help="What an hour of a GPU or machine costs.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
@click.option("--html", type=click.Path(dir_okay=False, path_type=Path), help="Write a page to a file.")
def ls(
    recipe: str | None, runs: str, cost: bool, price: float | None, as_json: bool, html: Path | None
) -> None:
    """List every result with its state, date and cost; those of earlier settings by their entry."""
    import json

    from trivium.pipeline.listing import results, table

    if html is not None:
        from trivium.pipeline.index import write_index

        click.echo(f"Wrote {write_index(runs, html, price)}.")
        return
    found = results(runs, recipe, price=price)
    if as_json:
        click.echo(json.dumps(found, indent=2))
    else:
        print_table(table(found, cost=cost))


@click.command()
@click.argument("recipe", required=False)
@runs_option
@click.option("--port", default=8321, show_default=True, type=click.IntRange(1, 65535))
def watch(recipe: str | None, runs: str, port: int) -> None:
    """Show a run while it goes on, on a page of this machine; without RECIPE the newest."""
    from trivium.pipeline.watch import watch

    watch(runs, recipe, port, say=click.echo)


@click.command()
@click.argument("stage")
@runs_option
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


@click.command()
@click.argument("stage")
@runs_option
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def why(stage: str, runs: str, as_json: bool) -> None:
    """Tell what a result came from: data, code, machine, every ancestor, and who reuses it since when."""
    import json

    from trivium.pipeline.lineage import line, text

    found = line(runs, stage)
    click.echo(json.dumps(found, indent=2, ensure_ascii=False) if as_json else text(found))


@click.command()
@recipe_argument
@click.argument("stage")
@click.option("--because", required=True, help="Why the change cannot matter; it is recorded.")
@runs_option
@set_option
def accept(recipe: str, stage: str, because: str, runs: str, overrides: tuple[str, ...]) -> None:
    """Accept a stage's earlier result as unchanged by a change of code alone."""
    from trivium.pipeline.why import accept

    click.echo(accept(recipe, stage, because, runs, overrides))


@click.command()
@runs_option
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
