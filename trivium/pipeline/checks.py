"""What a stage would refuse when its turn comes, found from its settings and the first rows of its data."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from typing import Any

import numpy as np

from trivium.data.conversations import Encoder
from trivium.data.encoding import Refused
from trivium.data.preference_forms import recognised_form
from trivium.data.preferences import Completion, PreferenceData
from trivium.data.shapes import recognised
from trivium.data.sources import Document, Source
from trivium.data.steps import labelled_steps
from trivium.grade.rewards import FunctionReward, Reward, reward
from trivium.kit import machine
from trivium.kit.errors import TriviumError
from trivium.kit.numbers import short
from trivium.learn.objectives.preference import UNPAIRED
from trivium.model.folder import StoredWeights, load_config
from trivium.model.hub import resolve
from trivium.pipeline.looking import LONGEST, Looked, bytes_per_token, look
from trivium.pipeline.run import Run
from trivium.recipe.outside import locate
from trivium.stages.parts.inheritance import trains_on
from trivium.stages.parts.stage import Reference, Stage
from trivium.stages.parts.training import LONGEST as MOST
from trivium.stages.synthesize import Synthesize
from trivium.tokens.adopt import with_chat_template
from trivium.tokens.tokenizer import Tokenizer
from trivium.tokens.train import SMALLEST, train_tokenizer

TEXTS = ("corpus", "pretrain", "midtrain", "anneals", "merge", "quantize")
PREFERENCES = ("preference", "reward")
FITTED = ("midtrain", "sft", "distill", "preference", "reward")
PROMPTED = ("rlvr", "ppo")
PROMPT_COLUMNS = ("prompt", "question", "problem", "messages")
BYTES_TO_TRAIN = 16
"""Weights, gradients and two moments in float32."""


@dataclass
class Checked:
    """What was found on the way: what lies in each source of each stage, and what a person should know."""

    sources: dict[str, dict[str, Looked]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    here: bool = True
    """Whether the plan is for this machine, so that its memory counts."""
    _known: dict[str, Looked] = field(default_factory=dict)

    def look(self, source: Source) -> Looked:
        """The first rows of a source, read once however many stages name it."""
        key = source.model_dump_json()
        if key not in self._known:
            self._known[key] = look(source)
        return self._known[key]


def check(prepared: Run, name: str, derived: Mapping[str, Mapping[str, Any]], checked: Checked) -> None:
    """Refuse what stage `name` would refuse; `derived` holds the planned numbers of it and what it needs."""
    node = prepared.nodes[name]
    stage = node.stage
    for reference in stage.references():
        if reference.name not in node.parents:
            place = prepared.recipe.written.place(
                ["stages", name.partition(".")[0], *reference.setting.split(".")]
            )
            if "source" in reference.needs and reference.read is not None:
                _check_source(prepared, name, reference, place, checked)
            elif reference.needs[0] in ("model", "reward"):
                _check_model(prepared, reference.name, place, checked)
    if isinstance(stage, Stage) and hasattr(stage, "reward"):
        _check_rewards(prepared, name, checked)
    _check_lengths(name, stage, derived)
    rate = getattr(getattr(stage, "learning_rate", None), "start", None)
    if isinstance(rate, (int, float)) and rate > 1:
        checked.notes.append(
            f"{name}: `learning_rate: {rate:g}` is far above what trains; Muon's lie near 0.02, "
            "AdamW's near 0.0001"
        )
    if stage.kind == "tokenizer":
        _check_vocabulary(prepared, name, checked)
    if stage.kind == "merge":
        _check_merge(prepared, name)
    if stage.kind == "quantize":
        _check_held_out(name, stage, checked)
    _check_memory(name, stage, derived[name], checked)


def _check_source(prepared: Run, name: str, reference: Reference, place: str, checked: Checked) -> None:
    assert reference.read is not None
    found = locate(reference.name, prepared.recipe.base)
    if found is None and not reference.name.startswith("world:"):
        if find_spec("datasets") is None:
            raise TriviumError(
                f"{place}: {reference.name} is read from the hub, which needs: pip install 'trivium[hub]'."
            )
        checked.notes.append(
            f"{name}: {reference.name} is read from the hub when the stage runs; not looked at"
        )
        return
    source = reference.read if found is None else reference.read.model_copy(update={"path": str(found)})
    if found is not None and found.is_dir() and (found / "manifest.json").is_file():
        return
    try:
        looked = checked.look(source)
    except TriviumError as error:
        raise TriviumError(f"{place}: {error}") from None
    if not looked.rows:
        raise TriviumError(
            f"{place}: {reference.name} holds no document; put data there or name another place."
        )
    _check_format(prepared.nodes[name].stage, looked.rows[0], place)
    checked.sources.setdefault(name, {})[reference.name] = looked
    if looked.bad:
        checked.notes.append(f"{name}: {len(looked.bad)} of the first rows of {reference.name} are skipped")


def _check_format(stage: Stage, row: Document, place: str) -> None:
    """The first row has to be something that the stage learns from."""
    kind = stage.kind
    try:
        if kind in ("sft", "distill"):
            recognised(row.fields).read(row.fields)
        elif getattr(stage, "process", False):
            labelled_steps(row.fields)
        elif kind in PREFERENCES and not is_online(stage):
            form = recognised_form(row.fields)
            form.read(row.fields)
            single = "label" in form.columns
            losses = set(getattr(stage, "loss", {}))
            if single and UNPAIRED.isdisjoint(losses):
                raise TriviumError(
                    "is a single answer with a `label`, and this stage compares two answers; use a "
                    "`preference` stage with `loss: kto`, apo_zero_unpaired or bco"
                )
        elif asks_prompts(stage):
            if not any(row.fields.get(column) for column in PROMPT_COLUMNS):
                raise TriviumError(
                    f"has no prompt, only {_columns(row)}; name its column with `columns: {{prompt: ...}}`"
                )
        elif kind in TEXTS and row.text is None and "messages" not in row.fields:
            raise TriviumError(
                f"has no column 'text', only {_columns(row)}; name it with `columns: {{text: ...}}`"
            )
    except TriviumError as error:
        raise TriviumError(f"{place}: {row.id} {str(error).rstrip('.')}.") from None


def is_online(stage: Stage) -> bool:
    """Whether a preference stage lets the model answer prompts, and has no pairs to read."""
    return getattr(stage, "online", None) is not None


def asks_prompts(stage: Stage) -> bool:
    """Whether rows have to be prompts that the model answers."""
    answers = stage.kind in (*PROMPTED, "label_steps") or is_online(stage)
    return answers and getattr(stage, "next_words", None) is None


def _columns(row: Document) -> str:
    return ", ".join(map(repr, row.fields)) or "nothing"


def _check_model(prepared: Run, name: str, place: str, checked: Checked) -> None:
    """A model from outside has a config that is understood and weights that are there."""
    found = locate(name, prepared.recipe.base)
    if found is None:
        try:
            found = resolve(name, fetch=False)
        except TriviumError:
            checked.notes.append(f"{place}: {name} is fetched from the hub when the stage runs")
            return
    folder = resolve(found)
    try:
        if (folder / "config.json").is_file() or not (folder / "tokenizer.json").is_file():
            load_config(folder)
            if not (folder / "adapter").is_dir():
                StoredWeights(folder)
    except TriviumError as error:
        raise TriviumError(f"{place}: {error}") from None


def _check_rewards(prepared: Run, name: str, checked: Checked) -> None:
    """Scorers exist, functions import, and the columns they read are there."""
    stage = prepared.nodes[name].stage
    wanted = getattr(stage, "reward", None)
    place = prepared.recipe.written.place(["stages", name.partition(".")[0], "reward"])
    for setting in wanted if isinstance(wanted, list) else []:
        if isinstance(setting, Mapping) and "model" in setting:
            continue
        try:
            part, _ = reward(setting, prepared.recipe.base)
        except TriviumError as error:
            raise TriviumError(f"{place}: {error}") from None
        except Exception as error:
            raise TriviumError(
                f"{place}: {setting} cannot be imported: {type(error).__name__}: {error}; fix the file."
            ) from None
        asked = {} if getattr(stage, "next_words", None) else checked.sources.get(name, {})
        for source, looked in asked.items():
            _try_columns(part, looked.rows[0], f"{place}: {source}")


def _try_columns(part: Reward, row: Document, place: str) -> None:
    """Score one empty answer: a scorer that misses a column of the row says so; functions are not called."""
    if isinstance(part, FunctionReward):
        try:
            part.check_arguments(column for column in row.fields if column != "prompt")
        except TriviumError as error:
            raise TriviumError(f"{place}: {error}") from None
        return
    if getattr(part.scorer, "many", None) is not None or part.name in ("code", "judge"):
        return
    columns = {key: [value] for key, value in row.fields.items() if key != "prompt"}
    try:
        part(["?"], ["?"], **columns)
    except TriviumError as error:
        raise TriviumError(f"{place}: {row.id}: {error}") from None


def _check_lengths(name: str, stage: Stage, derived: Mapping[str, Mapping[str, Any]]) -> None:
    """The rows fit what the model reads, and a batch holds one of them."""
    start = getattr(stage, "start", None)
    # Of a model from outside, the stage's own numbers hold what it reads.
    parent = start.partition("@")[0] if isinstance(start, str) else None
    reach = derived[parent if parent in derived else name].get("context") if parent else None
    wish = getattr(stage, "context", None)
    method = getattr(wish, "method", None)
    longest = getattr(wish, "longest", wish)
    if stage.kind in FITTED and reach and longest and longest > reach and method is None:
        raise TriviumError(
            f"{name}: {start} reads {reach:,} tokens at most and `context` is {longest:,}; lower it, or "
            "extend the context in a midtrain stage, as in `context: {length: "
            + str(longest)
            + ", method: yarn}`."
        )
    rooms = {"max_new_tokens": getattr(stage, "max_new_tokens", None)} if stage.kind in PROMPTED else {}
    if isinstance(stage, Synthesize):
        rooms = dict(stage.longest_answers())
    for setting, room in rooms.items():
        if reach and room and room >= reach:
            raise TriviumError(
                f"{name}: {start} reads {reach:,} tokens, which `{setting}: {room}` fills; lower it."
            )


def _check_vocabulary(prepared: Run, name: str, checked: Checked) -> None:
    """A vocabulary is learned from texts or messages; some source has to hold either."""
    looked = checked.sources.get(name, {})
    if looked and not any(
        one.rows[0].text is not None or "messages" in one.rows[0].fields for one in looked.values()
    ):
        source, one = next(iter(looked.items()))
        place = prepared.recipe.written.place(["stages", name.partition(".")[0], "data"])
        raise TriviumError(
            f"{place}: {source} has no column 'text', only {_columns(one.rows[0])}; name it with "
            "`columns: {text: ...}`."
        )


def _check_merge(prepared: Run, name: str) -> None:
    stage = prepared.nodes[name].stage
    if getattr(stage, "data", None) is not None:
        return
    for written in getattr(stage, "of", []):
        parent = prepared.nodes[name].parents.get(written)
        if parent is None:
            found = locate(written, prepared.recipe.base)
            known = found is not None and (found / "stage.yaml").is_file()
        else:
            kind = prepared.nodes[parent.stage].stage.kind
            known = kind == "merge" or trains_on(kind) == "documents"
        if not known:
            raise TriviumError(
                f"{name}: nothing is known of the texts that {written} held out; name the text to measure on "
                "as `data: ./texts`."
            )


def _check_held_out(name: str, stage: Any, checked: Checked) -> None:
    looked = checked.sources.get(name, {})
    if not looked:
        return
    counts = [one.held_out(stage.data[source].validation) for source, one in looked.items()]
    if all(count == 0 for count in counts):
        source = next(iter(looked))
        raise TriviumError(
            f"{name}: `data` has no held-out part to measure on; write "
            f"`data: {{{source}: {{validation: 0.1}}}}`."
        )


def _check_memory(name: str, stage: Stage, numbers: Mapping[str, Any], checked: Checked) -> None:
    parameters = numbers.get("parameters")
    if not parameters or not hasattr(stage, "learning_rate") or not checked.here:
        return
    needed = BYTES_TO_TRAIN * parameters
    if getattr(stage, "adapter", None) is not None:
        needed = 4 * parameters
    needed += 4 * int(numbers.get("teacher_parameters", 0))
    here = machine.describe()
    if needed > here.device_memory:
        checked.notes.append(
            f"{name}: {short(parameters)} parameters need about {needed / 2**30:,.0f} GiB to train; "
            f"{here.device} has {here.device_memory / 2**30:.0f} GiB here"
        )


def check_disk(prepared: Run, derived: Mapping[str, Mapping[str, Any]]) -> None:
    """The models, moments and saved states of all stages have to fit on the disk."""
    needed = 0
    for name, numbers in derived.items():
        if prepared.entry(name).state != "done" and hasattr(prepared.nodes[name].stage, "checkpoint"):
            needed += 4 * BYTES_TO_TRAIN * int(numbers.get("parameters", 0))
    place = prepared.store.runs.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if needed > free:
        raise TriviumError(
            f"The models and saved states need about {needed / 2**30:,.1f} GiB and {free / 2**30:,.1f} GiB "
            f"are free under {place}; make room, or name another folder with --runs."
        )


EXAMPLES = ("sft", "distill")


def check_rows(
    prepared: Run, name: str, tokenizer: Tokenizer | None, numbers: Mapping[str, Any], checked: Checked
) -> None:
    """Refuse sources none of whose first rows can be learned from, and say how many are too long."""
    stage: Any = prepared.nodes[name].stage
    paired = stage.kind in PREFERENCES and not is_online(stage) and not getattr(stage, "process", False)
    if stage.kind not in EXAMPLES and not paired:
        return
    reach = int(getattr(stage, "context", None) or min(MOST, numbers.get("context", MOST)))
    for source, looked in checked.sources.get(name, {}).items():
        portion = stage.data.get(source)
        if portion is None or not looked.rows:
            continue
        place = prepared.recipe.written.place(["stages", name.partition(".")[0], "data", source])
        # Without a tokenizer every byte is a token, which tells nothing about lengths.
        context = LONGEST if tokenizer is None else reach
        spoken = with_chat_template(tokenizer or _bytes())
        try:
            tally = _read(looked, spoken, context, paired, portion.on_bad == "skip", stage)
        except TriviumError as error:
            raise TriviumError(f"{place}: {error}") from None
        if not tally.kept:
            because = f"; {tally.named[0]}" if tally.named else ""
            raise TriviumError(
                f"{place}: none of the first {tally.rows} rows can be learned from{because}; "
                "give it others, or another `context`."
            )
        long = tally.cut + tally.dropped if tokenizer is not None else _long(looked, reach, numbers)
        if long:
            about, of = ("", tally.rows) if tokenizer is not None else ("about ", len(looked.rows))
            checked.notes.append(
                f"{name}: {about}{long} of the first {of} rows of {source} are cut or left out: they are "
                f"longer than the {reach} tokens of `context`, or teach nothing"
            )


def _read(looked: Looked, tokenizer: Tokenizer, context: int, paired: bool, skip: bool, stage: Any) -> Any:
    """What becomes of the first rows; one that cannot be read stops it, as it would stop the stage."""
    if paired:
        data = PreferenceData(tokenizer, context)
        pairs = list(data.read(looked.counted, skip=skip))
        if pairs and all(one.is_pair and _alike(*one.completions) for one in pairs):
            raise TriviumError(
                f"both answers of each of the first {len(pairs)} pairs are the same; name pairs that differ."
            )
        return data.tally
    encoder = Encoder(tokenizer, context, stage.loss if stage.kind == "sft" else stage.learned)
    for one in encoder.encode(looked.counted):
        if isinstance(one, Refused) and not skip:
            raise TriviumError(f"{one.document.id} {one.why}; fix it or set `on_bad: skip`.")
    return encoder.tally


def _alike(chosen: Completion, rejected: Completion) -> bool:
    return np.array_equal(chosen.tokens, rejected.tokens)


def _long(looked: Looked, context: int, numbers: Mapping[str, Any]) -> int:
    """How many rows are too long, by their characters."""
    each = bytes_per_token(int(numbers.get("vocabulary", 4096)))
    return sum(size / each > context for size in looked.characters)


@cache
def _bytes() -> Tokenizer:
    return train_tokenizer((), SMALLEST)
