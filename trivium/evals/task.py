"""What a task is, and the tasks by name."""

import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from importlib import import_module
from typing import Any, TypeVar

from trivium import world
from trivium.evals.asking import Subject
from trivium.evals.results import Record
from trivium.evals.settings import Settings, TaskSpec, named, read_spec
from trivium.evals.statistics import Interval
from trivium.generate.search.settings import SearchSettings
from trivium.grade.rewards import is_in_a_file
from trivium.grade.scorer import ready, scorer, scorer_names
from trivium.kit.errors import TriviumError


@dataclass
class Found:
    """What a task hands over: its items, and numbers that are no mean over them."""

    records: list[Record]
    whole: Mapping[str, Interval] = field(default_factory=dict)
    style: str | None = None
    """How it asked, where that is not how the model is asked elsewhere."""


Run = Callable[..., Found]
R = TypeVar("R", bound=Run)
SOME_HEED = ("shots", "samples", "chain_of_thought", "reasoning", "search")
"""The settings of asking that mean nothing to some tasks."""
NAMES = ("data", "examples", "model")
"""The options that name a file, a folder or a stage."""
SEARCH_SCORER = "search.scorer"
"""What names the reward model of a search."""
SEARCH_FILE = "search.file"
"""What names the file of a function that scores a search."""
SCORER_FILE = "scorer.file"
"""What names the file of a function that scores the answers of `own`."""
FILES = (SEARCH_FILE, SCORER_FILE)
MODELS = ("model", SEARCH_SCORER)
"""What names a reward model, which may be a stage."""
OWN_PROBABILITY = "logprob"
SOURCES = ("source", "sources")
"""The options that name a source of the world, or a file."""
_TRUTHS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


@dataclass(frozen=True)
class Task:
    """One skill: a sentence on what it measures, its headline numbers, and the function that asks."""

    name: str
    description: str
    headline: tuple[str, ...]
    run: Run
    heeds: tuple[str, ...] = ()
    """Which of the settings that only some tasks know it obeys."""
    foresee: Callable[..., object] | None = None
    """Draws the first it would ask of the world, so that wrong options are refused before any model."""
    scorer: str | None = None
    """What judges the answers where that needs processes of its own, which are tried before work begins."""

    def __call__(self, subject: Subject, settings: Settings, options: Mapping[str, Any]) -> Found:
        return self.run(subject, settings, **self.checked(options))

    def checked(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """The options in their own types; one the task does not have is an error that names those it has."""
        known = list(inspect.signature(self.run).parameters.values())[2:]
        named = [one for one in known if one.kind is not inspect.Parameter.VAR_KEYWORD]
        if len(named) == len(known):
            names = [one.name for one in named]
            for option in options:
                if option not in names:
                    has = f"it has {', '.join(names)}" if names else "it has none of its own"
                    raise TriviumError(f"The task {self.name} has no option '{option}'; {has}.")
        for one in named:
            if one.default is one.empty and one.name not in options:
                raise TriviumError(f"The task {self.name} needs `{one.name}`: {self.name}?{one.name}=...")
        kinds = {one.name: _written(one.annotation) for one in named}
        return {
            option: _typed(self.name, option, kinds.get(option, ""), value)
            for option, value in options.items()
        }


_MADE: dict[str, Task] = {}


def as_task(
    name: str, headline: tuple[str, ...], heeds: tuple[str, ...] = (),
    foresee: Callable[..., object] | None = None, scorer: str | None = None,
) -> Callable[[R], R]:  # fmt: skip
    """Register a function as a task, described by the first paragraph of its docstring."""

    def registered(run: R) -> R:
        description = " ".join(inspect.cleandoc(run.__doc__ or "").partition("\n\n")[0].split())
        _MADE[name] = Task(name, description, headline, run, heeds, foresee, scorer)
        return run

    return registered


def _written(annotation: Any) -> str:
    """A type as it is written: a file may keep its annotations as text or not."""
    return annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)


def _typed(task: str, option: str, kind: str, value: Any) -> Any:
    if kind.startswith("bool"):
        truth = value if isinstance(value, bool) else _TRUTHS.get(str(value).lower())
        if truth is None:
            raise TriviumError(f"The task {task} has no use for {option}={value}; write true or false.")
        return truth
    if kind.partition(" ")[0] in ("int", "float"):
        return number_option(task, option, value, int if kind.startswith("int") else float)
    if kind.startswith("str") and "int" not in kind and "float" not in kind:
        return _text_option(task, option, kind, value)
    return value


def _text_option(task: str, option: str, kind: str, value: Any) -> Any:
    """An option as a text or texts; a number, which YAML makes of 2020, is one."""
    if value is None and "None" in kind:
        return None
    several = isinstance(value, list | tuple) and ("Sequence" in kind or "list" in kind)
    texts = value if several else [value]
    if not all(isinstance(one, str | int | float) for one in texts):
        raise TriviumError(f"The task {task} has no use for {option}={value}; write a text.")
    return [str(one) for one in texts] if several else str(value)


def number_option(task: str, option: str, value: Any, kind: type[int] | type[float]) -> Any:
    """An option as a number, or one sentence on why it is none."""
    try:
        number = kind(value)
    except (TypeError, ValueError, OverflowError):
        number = None
    # A mapping may hold 2.5 where a whole number is meant.
    if number is None or (isinstance(value, float) and number != value):
        wanted = "a whole number" if kind is int else "a number"
        raise TriviumError(f"The task {task} has no use for {option}={value}; write {wanted}.")
    return number


@dataclass(frozen=True)
class Planned:
    """A task that will be asked: its label, and the settings and options it obeys."""

    label: str
    task: Task
    settings: Settings
    options: Mapping[str, Any]


def planned(spec: TaskSpec, settings: Settings) -> Planned:
    """Read and check what a person wrote; a setting for all tasks is left out where it means nothing."""
    label, name, merged, options = read_spec(spec, settings)
    one = task(name)
    _, given = named(spec)
    unheeded = [setting for setting in SOME_HEED if setting not in one.heeds]
    for setting in unheeded:
        if setting in given:
            raise TriviumError(f"The task {name} knows no `{setting}`; take it away.")
    plain = {setting: Settings.model_fields[setting].default for setting in unheeded}
    heeded = merged.model_copy(update=plain)
    if heeded.reasoning != "off" and not heeded.chain_of_thought:
        raise TriviumError(
            f"The task {label} is to think first and to state the result at once: take `reasoning` away, or "
            "set `chain_of_thought: true`."
        )
    if heeded.reasoning != "off" and heeded.style == "continue":
        raise TriviumError(
            f"The task {label} is to think first, which only a chat template can ask for: take `reasoning` "
            "away, or set `style: chat`."
        )
    if heeded.search is not None and heeded.samples:
        raise TriviumError(
            f"The task {label} is to search for its answers, so `samples` draws nothing beside them; take "
            "one of `search` and `samples` away."
        )
    checked = one.checked(options)
    if one.foresee is not None:
        one.foresee(heeded.model_copy(update={"limit": 1}), **checked)
    return Planned(label, one, heeded, checked)


def listed(given: Any) -> list[Any]:
    """What a person wrote as `one+another`, as a list, or as a single thing."""
    if given is None:
        return []
    if isinstance(given, str):
        return given.split("+")
    return list(given) if isinstance(given, list | tuple) else [given]


def of_the_world(source: str) -> bool:
    """Whether this is one of the world's sources, written with or without `world:`."""
    return source.startswith("world:") or source.partition("?")[0] in world.sources()


def outside(spec: TaskSpec) -> list[tuple[str, str]]:
    """What a task, spelled out, names that is not the world's: pairs of an option and a name."""
    given: Mapping[str, Any] = {} if isinstance(spec, str) else spec
    judge = search_model(given)
    scored = [] if judge is None else [(SEARCH_SCORER, judge)]
    for option, scorer_name in ((SEARCH_FILE, _search_scorer(given)), (SCORER_FILE, given.get("scorer"))):
        if is_in_a_file(scorer_name):
            scored.append((option, scorer_name.rpartition(":")[0]))
    return scored + [
        (option, name)
        for option in (*NAMES, *SOURCES)
        if option in given
        for name in _names(option, given[option])
        if not (option in SOURCES and of_the_world(name))
    ]


def search_model(spec: Mapping[str, Any]) -> str | None:
    """The reward model that scores a task's search, a stage or a folder; None where it is something else."""
    judge = _search_scorer(spec)
    if isinstance(judge, Mapping):
        judge = judge.get("model")
    plain = not isinstance(judge, str) or judge in (OWN_PROBABILITY, *scorer_names()) or is_in_a_file(judge)
    return None if plain else judge


def scorer_files(spec: TaskSpec) -> list[str]:
    """The files of the functions that score a task's answers or its search."""
    return [name for option, name in outside(spec) if option in FILES]


def _search_scorer(spec: Mapping[str, Any]) -> Any:
    search = spec.get("search")
    if isinstance(search, SearchSettings):
        search = search.model_dump()
    return search.get("scorer") if isinstance(search, Mapping) else None


def with_search_model(search: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The settings of a search whose reward model lies there."""
    judge = search["scorer"]
    return {**search, "scorer": {**judge, "model": where} if isinstance(judge, Mapping) else where}


def _names(option: str, value: Any) -> list[str]:
    if isinstance(value, list | tuple):
        return [str(one) for one in value]
    return str(value).split("+") if option == "sources" else [str(value)]


def placed(spec: TaskSpec, place: Callable[[str, str], str]) -> str | dict[str, Any]:
    """The task with each name of something outside replaced by where that lies."""
    if isinstance(spec, str):
        return spec
    found = dict(spec)
    for option, name in outside(spec):
        if option == SEARCH_SCORER:
            found["search"] = with_search_model(found["search"], place(option, name))
            continue
        if option == SEARCH_FILE:
            search = found["search"]
            function = search["scorer"].rpartition(":")[2]
            found["search"] = {**search, "scorer": f"{place(option, name)}:{function}"}
            continue
        if option == SCORER_FILE:
            found["scorer"] = place(option, name) + found["scorer"][len(name) :]
            continue
        where, value = place(option, name), found[option]
        replaced = [where if str(one) == name else one for one in value] if isinstance(value, list) else []
        found[option] = replaced or where
    return found


def placed_search(asking: Settings, place: Callable[[str, str], str]) -> Settings:
    """How tasks are asked, with the scorer of the search replaced by where that lies."""
    if asking.search is None:
        return asking
    spec = placed({"search": asking.search.model_dump(exclude_unset=True)}, place)
    assert isinstance(spec, dict)
    return asking.model_copy(update={"search": SearchSettings.model_validate(spec["search"])})


def spelled_out(spec: TaskSpec) -> str | dict[str, Any]:
    """A task that names files as a mapping, in which they can be told apart; any other as it is written."""
    name, options = named(spec)
    if not outside(options):
        return spec if isinstance(spec, str) else dict(spec)
    if "sources" in options:
        options["sources"] = _names("sources", options["sources"])
    return {**({"name": spec} if isinstance(spec, str) else {}), **options, "task": name}


def checked_specs(specs: Sequence[TaskSpec]) -> list[str | dict[str, Any]]:
    """Tasks as a recipe lists them, spelled out; a ValueError, as pydantic wants it, where one is wrong."""
    try:
        for spec in specs:
            planned(spec, Settings())
    except TriviumError as error:
        raise ValueError(str(error)) from None
    return [spelled_out(spec) for spec in specs]


_MODULES = {
    "bits": "bits", "facts": "knowledge", "craft": "knowledge", "tongue": "knowledge",
    "calibration": "knowledge", "sums": "reasoning", "sql": "reasoning", "instructions": "manners",
    "format": "manners", "ending": "manners", "sycophancy": "sycophancy", "passkey": "passkey",
    "positions": "context", "conversation": "conversation", "forgetting": "bits", "pictures": "modalities",
    "sounds": "modalities", "gsm8k": "published", "svamp": "published", "humaneval": "published",
    "own": "published", "replies": "own", "pairs": "own", "first_error": "first_error",
}  # fmt: skip
"""Every task with the module that holds it."""
ALSO_CALLED = {
    "flattery": "sycophancy",
    "math": "sums",
    "ledger": "sql",
    "chronicle": "passkey",
    "chat": "instructions",
}


def task_names() -> list[str]:
    """Every task there is."""
    return list(_MODULES)


def ready_for(spec: TaskSpec) -> None:
    """Try the scorer of a task, where that needs processes of its own."""
    _, name, _, options = read_spec(spec, Settings())
    grade = options.get("scorer", task(name).scorer)
    if grade is None or "model" in options or is_in_a_file(grade):
        return
    unsafe = {"unsafe_sandbox": True} if _TRUTHS.get(str(options.get("unsafe_sandbox")).lower()) else {}
    ready(scorer(grade, **unsafe))


def task(name: str) -> Task:
    """The task of this name, or one of lm-evaluation-harness."""
    if name.startswith("lm_eval:"):
        made: Task = import_module("trivium.evals.harness").harness_task(name)
        return made
    called = ALSO_CALLED.get(name, name)
    if called not in _MODULES:
        near = get_close_matches(name, _MODULES, n=1)
        hint = f"; did you mean '{near[0]}'?" if near else f"; there are {', '.join(_MODULES)}."
        if os.path.isfile(name):
            hint = f": it is a file; ask about your own with replies?data={name}, pairs?data= or own?data=."
        raise TriviumError(f"There is no task called '{name}'{hint}")
    import_module(f"trivium.evals.{_MODULES[called]}")
    return _MADE[called]
