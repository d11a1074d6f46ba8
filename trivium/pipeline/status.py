"""How far every stage is, as a tree."""

from collections.abc import Mapping
from pathlib import Path

from trivium.kit.errors import TriviumError, nearest
from trivium.kit.tree import below_the_deepest
from trivium.pipeline.last_step import progress_of
from trivium.pipeline.run import Run, facts, last_row, prepare
from trivium.pipeline.store import Entry, Store
from trivium.recipe.schema import load

HEADER = ["stage", "state", "tokens", "loss", "time"]


def rows(runs: str | Path, recipe: str | None = None) -> list[list[str]]:
    """A table of all recipes that ran under `runs`, or of one with its pending stages."""
    store = Store(Path(runs))
    ran = store.recipes()
    if recipe is not None and recipe in ran and not Path(recipe).is_file():
        ran = {recipe: ran[recipe]}
    elif recipe is not None:
        return [HEADER, *_planned(prepare(recipe, runs))]
    if not ran:
        raise TriviumError(
            f"Nothing has run under {runs} yet{nearest(recipe or '', ran)}; start with `trivium run`."
        )
    table = [HEADER]
    for name, entries in ran.items():
        table.append([name, *[""] * (len(HEADER) - 1)])
        table += _tree(
            {stage: _state(entry) for stage, entry in entries.items()},
            {stage: _parents_in(entry, entries) for stage, entry in entries.items()},
        )
    return table


def _planned(run: Run) -> list[list[str]]:
    """The stages of a recipe as it reads now: done, changed or pending."""
    linked = run.store.recipes().get(run.recipe.name, {})
    states = {}
    for name in run.nodes:
        entry = run.entry(name)
        state = _state(entry)
        if state[0] == "absent":
            state = ["changed" if name in linked else "pending", *[""] * (len(HEADER) - 2)]
        states[name] = state
    parents = {name: [parent.stage for parent in node.parents.values()] for name, node in run.nodes.items()}
    return [[run.recipe.name, *[""] * (len(HEADER) - 1)], *_tree(states, parents)]


def _state(entry: Entry) -> list[str]:
    return [entry.state, *facts(entry)]


def last_steps(runs: str | Path, recipe: str | None = None) -> list[str]:
    """A line for each stage of reinforcement or preferences that ran: what its last step says."""
    ran = Store(Path(runs)).recipes()
    if recipe is not None:
        name = recipe if recipe in ran and not Path(recipe).is_file() else load(recipe).name
        ran = {name: ran[name]} if name in ran else {}
    found = [
        (f"{name}/{stage}", progress_of(last_row(entry)))
        for name, entries in ran.items()
        for stage, entry in entries.items()
    ]
    return [
        f"{stage}, last step: {', '.join(f'{name} {value}' for name, value in facts.items())}"
        for stage, facts in found
        if facts
    ]


def _parents_in(entry: Entry, entries: Mapping[str, Entry]) -> list[str]:
    names = {other.folder.name: stage for stage, other in entries.items()}
    parents = [parent.partition("@")[0] for parent in (entry.record.get("parents") or {}).values()]
    return [names[parent] for parent in parents if parent in names]


def _tree(states: Mapping[str, list[str]], parents: Mapping[str, list[str]]) -> list[list[str]]:
    """Indented rows; a stage with several parents hangs below the deepest of them."""
    children = below_the_deepest({name: parents[name] for name in states})
    table: list[list[str]] = []

    def add(name: str, lead: str, last: bool) -> None:
        table.append([f"{lead}{'└ ' if last else '├ '}{name}", *states[name]])
        below = children.get(name, [])
        for child in below:
            add(child, lead + ("  " if last else "│ "), child == below[-1])

    roots = children.get(None, [])
    for root in roots:
        add(root, "", root == roots[-1])
    return table
