"""The verbs that ask models: eval, compare, distance, grade."""

from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from trivium.cli.options import runs_option, unsafe_option
from trivium.cli.runs import explain
from trivium.kit.errors import TriviumError
from trivium.kit.table import print_table


@click.command("eval")
@click.argument("model")
@runs_option
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
@click.option(
    "--search", help="Search for answers: best_of, majority, weighted, beam, dvts, mcts, backtrack."
)
@click.option(
    "--n", "search_n", type=int, help="Solutions, steps a round or simulations of the search; or 8."
)
@click.option("--scorer", help="What scores partial answers: a reward model, file.py:function, or logprob.")
@click.option("--token-budget", type=int, help="Tokens after which a search begins no further round.")
@click.option("--seed", default=0, show_default=True)
@click.option("--json", "to", type=click.Path(path_type=Path), help="Write the numbers here, answers beside.")
@click.option("--against", type=click.Path(path_type=Path), help="Compare with what --json wrote before.")
@unsafe_option
@click.pass_context
def eval_(
    context: click.Context,
    model: str,
    runs: str,
    tasks: str,
    to: Path | None,
    against: Path | None,
    unsafe_sandbox: bool,
    search: str | None,
    search_n: int | None,
    scorer: str | None,
    token_budget: int | None,
    **asking: Any,
) -> None:
    """Ask a model tasks whose truth is known; every number comes with n and a 95 % interval.

    A task named without options is asked of a stage as the report of its recipe asks it.
    """
    from trivium.evals import evaluate as evaluating
    from trivium.evals.results import Results
    from trivium.evals.settings import settings_of
    from trivium.grade.sandbox.client import announced, permitting_unsafe
    from trivium.lab.asked import asked_of, written
    from trivium.model.named import find_model, find_stage

    folder, stage = find_model(model, runs), find_stage(model, runs)
    found = searched(search, {"n": search_n, "scorer": scorer, "token_budget": token_budget}, runs)
    if found is not None:
        asking["search"] = found
    asked = None if stage is None else asked_of([stage], Path(runs))
    specs: list[Any] = tasks.split(",")
    if asked is not None:
        # What is searched for is not drawn as well; the report may do so.
        without = () if found is None else ("samples",)
        for name, value in asked.asking.model_dump(exclude=set(without)).items():
            if name in asking and context.get_parameter_source(name) == ParameterSource.DEFAULT:
                asking[name] = value
        other = [asked.otherwise(spec) for spec in specs]
        specs = [asked.as_the_report_asks(spec, without) for spec in specs]
        click.echo(f"asked as the report of {asked.recipe}: {', '.join(map(written, specs))}", err=True)
        for spec in other:
            if spec is not None:
                click.echo(f"the report asks differently: {written(spec)}", err=True)
    settings = settings_of("trivium eval", asking)
    before = None if against is None else Results.load(against)
    if to is not None and to.is_dir():
        raise TriviumError(f"{to} is a folder; name a file for the numbers.")
    say = lambda line: click.echo(line, err=True)
    with announced(say), permitting_unsafe(unsafe_sandbox):
        results = evaluating.evaluate_folder(folder, specs, settings, name=model, say=say)
    print_table(results.table())
    if to is not None:
        results.save(to)
        click.echo(f"Wrote {to} and every answer beside it.")
    if before is not None:
        print_table(evaluating.comparison_table(evaluating.compare(before, results)))


def searched(method: str | None, given: dict[str, Any], runs: str) -> dict[str, Any] | None:
    """The settings of a search from options; a scorer that is a stage is named by its folder."""
    from trivium.evals.searching import find_scorer

    said = {name: value for name, value in given.items() if value is not None}
    if method is None:
        if said:
            name = {"n": "--n", "scorer": "--scorer", "token_budget": "--token-budget"}[next(iter(said))]
            raise TriviumError(f"{name} is part of a search: add --search with a method, such as best_of.")
        return None
    if "scorer" in said:
        said["scorer"] = find_scorer(said["scorer"], runs)
    return {"method": method, **said}


@click.command()
@click.argument("models", nargs=-1, required=True)
@runs_option
@click.option(
    "--on", "tasks", help="What to ask: sums?samples=8,instructions; else what fits the models' data."
)
@click.option("--limit", type=int, help="Questions per task; else as many as the report asks, or 100.")
@click.option("--seed", default=0, show_default=True)
@click.option(
    "--html", "to", type=click.Path(path_type=Path), help="The page; else compare.html under --runs."
)
def compare(
    models: tuple[str, ...], runs: str, tasks: str | None, limit: int | None, seed: int, to: Path | None
) -> None:
    """Ask models the same things and show side by side what each can do; writes one HTML page.

    MODELS are stages (`sft`, `laptop/sft`), Hugging Face folders, or ids on the hub, in the order they grew.
    """
    from trivium.evals.settings import settings_of
    from trivium.lab.compare import compare, summary_table

    plain = tasks is None and limit is None and seed == 0
    given = {"limit": 100 if limit is None else limit, "seed": seed}
    settings = None if plain else settings_of("trivium compare", given)
    place = to or Path(runs) / "compare.html"
    say = lambda line: click.echo(line, err=True)
    on = tasks.split(",") if tasks else []
    rows = summary_table(compare(models, runs=Path(runs), to=place, on=on, settings=settings, say=say))
    print_table(rows)
    explain(rows)
    click.echo(f"Wrote {place}, and {place.with_suffix('.json')} with everything it shows.")


@click.command()
@click.argument("models", nargs=-1, required=True)
@runs_option
@click.option(
    "--prompts", type=click.Path(path_type=Path), help="A line each; the first model goes on from them."
)
@click.option("--count", default=24, show_default=True, help="Texts of a kind, where no prompts are given.")
@click.option("--seed", default=0, show_default=True)
@click.option(
    "--json",
    "to",
    is_flag=False,
    flag_value="-",
    help="Print all measures as JSON; with a file, write every token's divergence there.",
)
@click.option("--base", help="What the models grew from; else the nearest stage they share.")
@click.option("--probes", help="A versioned probe set (general-1) or a file like one; else validation texts.")
@click.option(
    "--weights/--no-weights", default=True, help="Whether to compare hidden states and weights as well."
)
@click.option(
    "--suggest", "goal", help="Order the models by the predicted cost to reach this one's behaviour."
)
def distance(
    models: tuple[str, ...],
    runs: str,
    prompts: Path | None,
    count: int,
    seed: int,
    to: str | None,
    base: str | None,
    probes: str | None,
    weights: bool,
    goal: str | None,
) -> None:
    """How close models' behaviours are: divergence of the next token, distance, angle, and their tree.

    Distance and angle are of what training changed in the next-token distributions since the base.
    """
    import json

    from trivium.lab.closeness_table import closeness, drawn, suggested, tables
    from trivium.lab.distance import distance

    place = Path(runs)
    if goal is not None:
        print_table(suggested(models, goal, runs=place, probes=probes, count=count, seed=seed))
        return
    asked: dict[str, Any] = {"base": base, "probes": probes, "count": count, "seed": seed, "weights": weights}
    if to == "-":
        click.echo(json.dumps(closeness(models, runs=place, **asked), indent=2))
        return
    if len(models) > 2 or base is not None or probes is not None:
        found = closeness(models, runs=place, **asked)
        heading = f"from {found['base']}, on {found['probes']}: {found['contexts']:,} contexts"
        click.echo(f"{heading}, next {found['unit']}")
        for rows in tables(found):
            click.echo()
            print_table(rows)
        click.echo("\n" + "\n".join(drawn(found["tree"])) + "\n")
        if probes is not None:
            return
    file = None if to is None else Path(to)
    print_table(distance(models, runs=place, prompts=prompts, count=count, seed=seed, to=file))


@click.command(add_help_option=False, context_settings={"ignore_unknown_options": True})
@click.argument("words", nargs=-1, type=click.UNPROCESSED)
def grade(words: tuple[str, ...]) -> None:
    """Score a text: mathematics, steps, code, SQL, format, instructions."""
    from trivium.grade.command import grade

    grade.main(list(words), prog_name="trivium grade", standalone_mode=False)
