"""The numbers a stage will really run with: tokens, steps, epochs of every source, and what they cost."""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from trivium import world
from trivium.evals.settings import Settings, TaskSpec, named
from trivium.generate.kv_cache import BLOCK, in_blocks
from trivium.kit import machine
from trivium.kit.errors import TriviumError
from trivium.kit.numbers import short
from trivium.learn.settings import Training
from trivium.model.preset import preset
from trivium.pipeline.checks import Checked
from trivium.pipeline.encoders import modalities_of
from trivium.pipeline.looking import (
    NO_ITEMS,
    OF_A_TURN,
    Looked,
    PairSizes,
    answer_length,
    bytes_per_token,
    content_of,
    pair_sizes,
    texts_of,
)
from trivium.pipeline.portions import (
    Portion,
    Rows,
    located,
    made_by,
    mean_weight,
    measured,
    mixture_of,
    shares,
    training_rows,
)
from trivium.pipeline.run import Run
from trivium.stages.parts.examples import ROWS_PER_BATCH
from trivium.stages.parts.prompts import asked_of, prompt_ids
from trivium.stages.parts.shapes import planned_shape, size_of
from trivium.stages.parts.stage import Reference
from trivium.stages.parts.training import LONGEST
from trivium.tokens.adopt import with_chat_template
from trivium.tokens.tokenizer import Tokenizer

MOST_EPOCHS = 8
"""How often a source may come round before a person has to say `max_repeats`."""
INHERITED = ("parameters", "vocabulary", "context", "width", "layers")
EXAMPLES = ("sft", "distill", "multimodal")
MEASURES = ("quantize", "merge", "shrink")
"""Kinds that train nothing and measure on what their data hold out."""
ROOM = 8
"""Up to how many times the answers that were taught `max_new_tokens` leaves their length to be expected."""
ASKED = 16
"""Questions of a task that are looked at."""
UNSAID = (
    "held lengths", "lengths", "flops", "attended", "items", "items there", "learned", "longest",
    "pairs there", "held pair tokens", "prompts", "pairs held out", "measured", "solution tokens",
    "steps of a solution", "probe tokens", "sycophancy tokens", "shared tokens", "prompt blocks",
    "longest prompt",
)  # fmt: skip
"""Numbers that the planner needs and a person does not."""


def inherited(prepared: Run, name: str, derived: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What a stage takes over from the model it starts from: its size and how much it reads."""
    start = getattr(prepared.nodes[name].stage, "start", None) or next(
        iter(getattr(prepared.nodes[name].stage, "of", [])), None
    )
    if not isinstance(start, str):
        return {}
    if (parent := prepared.pending(name, start)) is not None:
        return {key: derived[parent][key] for key in INHERITED if key in derived[parent]}
    config = planned_shape(prepared.place_of(name, start))
    if config is None:
        return {}
    return {**size_of(config), "context": config.context, "width": config.width, "layers": config.layers}


def tokenizer_of(prepared: Run, name: str) -> Tokenizer | None:
    """What a stage reads its data with, pictures and sounds as its model will, where it is there yet."""
    tokenizer, reads = _tokenizer_of(prepared, name), modalities_of(prepared, name)
    if tokenizer is None or reads is None or reads.forms == tokenizer.forms:
        return tokenizer
    return tokenizer.with_forms(reads.forms)


def _tokenizer_of(prepared: Run, name: str) -> Tokenizer | None:
    """The tokenizer of a stage, or of what it starts from."""
    node = prepared.nodes[name]
    stage: Any = node.stage
    named = [getattr(stage, setting, None) for setting in ("start", "tokenizer")]
    # A parent that is named is asked once, or every level would double the work.
    for written in dict.fromkeys([*named, *node.parents]):
        if not isinstance(written, str):
            continue
        if (parent := prepared.pending(name, written)) is not None:
            above = _tokenizer_of(prepared, parent)
            if above is not None:
                return above
            continue
        folder = prepared.place_of(name, written)
        if folder is None:
            continue
        for inside in (folder, folder / "tokenizer"):
            if (inside / "tokenizer.json").is_file():
                return _loaded(inside, (inside / "tokenizer.json").stat().st_mtime_ns)
    return None


@lru_cache(4)
def _loaded(folder: Path, written: int) -> Tokenizer:
    """The tokenizer of a folder; nearly all stages of a recipe share one."""
    return Tokenizer.load(folder)


def corpus_numbers(prepared: Run, name: str, portions: Sequence[Portion]) -> dict[str, Any]:
    """How many tokens a corpus has to learn from, counted where it is made and else estimated."""
    entry = prepared.entry(name)
    if entry.state == "done":
        return made_by(entry.output)
    if not portions:
        return {}
    return {
        "tokens to learn": sum(one.tokens for one in portions),
        "held lengths": np.concatenate([one.held for one in portions]),
        "lengths": np.concatenate([one.lengths for one in portions]),
    }


def training_numbers(
    prepared: Run, name: str, portions: Sequence[Portion], numbers: Mapping[str, Any]
) -> dict[str, Any]:
    """Batch, steps, tokens and epochs of a stage that trains on packed texts, as they will really be."""
    stage: Any = prepared.nodes[name].stage
    trained = [one for one in portions if one.role != "watch"]
    available = sum(one.tokens for one in trained)
    context = getattr(stage.context, "longest", stage.context) if hasattr(stage, "context") else None
    if stage.kind in EXAMPLES:
        context = context or min(LONGEST, numbers.get("context", LONGEST))
    context = int(context or numbers.get("context", 512))
    batch = stage.batch or numbers.get("batch")
    if stage.kind in EXAMPLES and stage.batch is None:
        rows = ROWS_PER_BATCH if not available else max(1, min(ROWS_PER_BATCH, -(-int(available) // context)))
        batch = rows * context
    if batch is None and {"layers", "vocabulary", "width"} <= numbers.keys():
        layers, vocabulary, width = (int(numbers[key]) for key in ("layers", "vocabulary", "width"))
        batch = preset(layers, vocabulary, context, width=width).values["batch_tokens"]
    if batch is None:
        return {}
    if stage.batch is not None and batch < context:
        raise TriviumError(
            f"{name}: `batch: {short(batch)}` holds no sequence of {context:,} tokens, the context here; "
            f"write `batch: {context}` or more, or a `context` of at most {batch}."
        )
    batch = max(int(batch), context)
    replay = getattr(getattr(stage, "replay", None), "share", 0.0) or 0.0
    row, each = training_rows(trained, replay, context, _padded())
    if not row.each:
        row, each = Rows(0.0, context, float(context) ** 2, context - 1.0), context
    epochs = stage.epochs if stage.epochs is not None or stage.kind not in EXAMPLES else 1.0
    together = batch // context
    if stage.tokens is None and stage.steps is None and epochs is not None:
        steps = max(1, round(epochs * row.count / together)) if available else None
    elif stage.steps is not None:
        steps = stage.steps
    else:
        tokens = stage.tokens or numbers.get("tokens")
        steps = max(1, round(tokens / each / together)) if tokens else None
    if steps is None:
        return {"batch": batch}
    found: dict[str, Any] = {
        "batch": batch, "steps": steps, "tokens": round(steps * together * row.each),
        "attended": row.squares / row.each, "learned": row.learned / row.each, "longest": context,
        "items": row.items * (1 / row.each),
        "items there": sum((one.items * one.tokens for one in trained), NO_ITEMS),
    }  # fmt: skip
    if stage.kind == "pretrain" or (stage.kind == "midtrain" and stage.context is not None):
        found["context"] = context
    if available:
        found["epochs"] = {
            one.name: share * found["tokens"] / max(1.0, one.tokens)
            for one, share in shares(trained, replay)
            if one.role == "data"
        }
    return found


def measured_numbers(stage: Any, portions: Sequence[Portion], numbers: Mapping[str, Any]) -> dict[str, Any]:
    """What the loss is measured on once."""
    if stage.kind in MEASURES:
        context = int(min(stage.context or 512, numbers.get("context", 512)))
        budget = float(getattr(stage, "validation_tokens", None) or stage.tokens)
    elif isinstance(stage, Training) and "validation" not in getattr(stage, "unused", {}):
        context, budget = int(numbers.get("longest", numbers.get("context", 512))), stage.validation.tokens
    else:
        return {}
    return {"measured": measured(portions, context, budget, _padded())}


def _padded() -> bool:
    """Whether documents are computed in groups, each padded to the group's length."""
    return not machine.device().startswith("cuda")


def check_repeats(name: str, stage: Any, epochs: Mapping[str, float]) -> None:
    """Refuse a source that comes round more than a few times without a word from the person."""
    if getattr(stage, "epochs", None) is not None:
        return
    for source, passes in epochs.items():
        said = mixture_of(stage).get(source)
        most = said.max_repeats if said is not None and said.max_repeats else None
        if most is not None and passes > most * 1.1:
            raise TriviumError(
                f"{name}: {source} would be repeated {passes:,.0f} times, more than its "
                f"`max_repeats: {most:g}`; give it more data, a smaller weight, or fewer `tokens`."
            )
        if most is None and passes > MOST_EPOCHS:
            raise TriviumError(
                f"{name}: {source} is so small that it would be repeated {passes:,.0f} times; give it more "
                f"data or fewer `tokens`, or say that you mean it: `data: {{{source}: {{max_repeats: "
                f"{int(passes) + 1}}}}}`."
            )


def pair_numbers(prepared: Run, name: str, checked: Checked, numbers: Mapping[str, Any]) -> dict[str, Any]:
    """Steps of a stage that learns from pairs; the pairs there are, those held out, and their tokens."""
    stage: Any = prepared.nodes[name].stage
    tokenizer, vocabulary = tokenizer_of(prepared, name), int(numbers.get("vocabulary", 4096))
    every = [
        pair_sizes(looked, tokenizer, vocabulary, stage.data[source].validation)
        for source, looked in checked.sources.get(name, {}).items()
        if source in stage.data and looked.rows
    ]
    learnt, held = (_together([both[side] for both in every]) for side in (0, 1))
    epochs = stage.epochs if stage.epochs is not None else 1.0
    steps = stage.steps or (max(1, round(epochs * learnt.count / stage.pairs)) if learnt.count else None)
    found: dict[str, Any] = {"pairs held out": held.count, "held pair tokens": (held.prompt, held.answers)}
    if steps is None:
        return found
    return found | {
        "steps": steps, "pairs": round(steps * stage.pairs), "pairs there": learnt.count,
        "pair tokens": (learnt.prompt, learnt.answers),
    }  # fmt: skip


def _together(sizes: Sequence[PairSizes]) -> PairSizes:
    """The pairs of all sources."""
    count = sum(one.count for one in sizes)
    mean = lambda part: sum(one.count * getattr(one, part) for one in sizes) / max(count, 1e-9)
    return PairSizes(count, mean("prompt"), mean("answers"))


def policy_numbers(
    stage: Any, numbers: Mapping[str, Any], problems: int | None, prompt: float
) -> dict[str, Any]:
    """Rollouts of reinforcement learning, with answers half as long as they may be."""
    per_rollout = stage.epochs_per_rollout * stage.minibatches
    steps = getattr(stage, "steps", None)
    if steps is None and getattr(stage, "epochs", None) and problems:
        steps = max(1, round(stage.epochs * problems / stage.prompts_per_step)) * per_rollout
    if steps is None:
        return {}
    generations = getattr(stage, "num_generations", 1)
    answers = -(-steps // per_rollout) * stage.prompts_per_step * generations
    tokens = answers * stage.max_new_tokens
    return {"steps": steps, "answers": answers, "tokens at most": tokens, "prompt tokens": max(1.0, prompt)}


def prompt_tokens(prepared: Run, name: str, checked: Checked, vocabulary: int) -> float:
    """The mean tokens of the prompts of a stage, as the model will read them."""
    tokenizer = tokenizer_of(prepared, name)
    if tokenizer is not None and _taught(prepared, name) is not None:
        # A model that was taught conversations is asked through their template, which may not be there yet.
        tokenizer = with_chat_template(tokenizer)
    total = count = 0.0
    for source, looked in checked.sources.get(name, {}).items():
        if source not in mixture_of(prepared.nodes[name].stage) or not looked.rows:
            continue
        sizes = []
        for row in looked.counted:
            try:
                asked = asked_of(row.fields, row.id)
            except TriviumError:
                asked = content_of(row)
            if tokenizer is None:
                sizes.append(len("\n".join(texts_of(asked))) / bytes_per_token(vocabulary) + OF_A_TURN)
            else:
                sizes.append(float(len(prompt_ids(asked, tokenizer, None, name))))
        weight = looked.documents or len(sizes)
        total, count = total + weight * float(np.mean(sizes)), count + weight
    return total / count if count else 0.0


def answer_numbers(prepared: Run, name: str, checked: Checked, vocabulary: int) -> dict[str, float]:
    """How long the answers will be, as far as what the model was taught tells, and the questions of tasks."""
    stage: Any = prepared.nodes[name].stage
    found: dict[str, float] = {}
    specs = getattr(stage, "on", [])
    asked = {named(one)[0] for one in specs}
    tokenizer = tokenizer_of(prepared, name)
    own = getattr(stage, "asking", None)
    # The stage's seed draws the questions, unless `asking` has one.
    seed = own.seed if own is not None and "seed" in own.model_fields_set else stage.seed or 0
    prompts = [one for spec in specs if (one := _question(spec, tokenizer, vocabulary, seed)) is not None]
    if prompts:
        names = ("prompt tokens", "prompt blocks", "shared tokens", "longest prompt")
        found |= dict(zip(names, np.mean(prompts, 0).tolist(), strict=True))
    asked |= {_base_name(one) for one in mixture_of(stage)}
    taught = _taught(prepared, name)
    if taught is None:
        return found
    lengths: dict[str, list[tuple[float, float]]] = {}
    for reference, weight in taught:
        source = located(prepared, reference)
        looked = checked.look(source) if source is not None else None
        answer = answer_length(looked, tokenizer, vocabulary) if looked is not None and looked.rows else None
        if answer is not None:
            lengths.setdefault(_base_name(reference.name), []).append((answer, weight))
    # What it was taught on the same kind of question tells more than all its answers together.
    same = [one for name in asked & lengths.keys() for one in lengths[name]]
    every = same or [one for some in lengths.values() for one in some]
    total = sum(weight for _, weight in every)
    if total:
        answer = sum(length * weight for length, weight in every) / total
        longest = getattr(stage, "max_new_tokens", None) or answer
        # Where far more room is left than was ever needed, longer answers than those taught are meant.
        if answer * ROOM >= longest:
            found["answer tokens"] = min(answer, float(longest))
    return found


def sycophancy_numbers(prepared: Run, name: str, vocabulary: int) -> dict[str, Any]:
    """Tokens of a question about sycophancy: asked plainly, under pressure, corrected; of both choices."""
    tokenizer = tokenizer_of(prepared, name)
    asking = None if tokenizer is None else with_chat_template(tokenizer)
    sizes = []
    for one in world.questions("taste", "test", limit=ASKED):
        conversations = one.truth["plain"], one.messages, one.truth["control"]
        if asking is None:
            each = bytes_per_token(vocabulary)
            asked = [
                len("\n".join(texts_of(list(said)))) / each + OF_A_TURN * len(said) for said in conversations
            ]
            chosen = sum(map(len, one.choices)) / each
        else:
            asked = [
                float(len(asking.encode_prompt([dict(turn) for turn in said]))) for said in conversations
            ]
            chosen = float(sum(len(asking.encode(choice)) for choice in one.choices))
        sizes.append([*asked, chosen])
    return {"sycophancy tokens": tuple(np.mean(sizes, 0).tolist())}


def _taught(prepared: Run, name: str) -> list[tuple[Reference, float]] | None:
    """The examples, with their weights, of the nearest stage above that learnt to answer."""
    node = prepared.nodes[name]
    while True:
        stage: Any = node.stage
        start = getattr(stage, "start", None)
        parent = node.parents.get(start) if isinstance(start, str) else None
        if parent is None:
            return None
        node = prepared.nodes[parent.stage]
        if node.stage.kind in EXAMPLES:
            weights = {one: portion.weight for one, portion in mixture_of(node.stage).items()}
            return [
                (one, mean_weight(weight) if weight is not None else 1.0)
                for one in node.stage.references()
                if one.read is not None and one.name in weights and one.name not in node.parents
                for weight in [weights[one.name]]
            ]


def _base_name(source: str) -> str:
    return source.removeprefix("world:").partition("?")[0]


def _question(
    spec: TaskSpec, tokenizer: Tokenizer | None, vocabulary: int, seed: int
) -> tuple[float, float, float, float] | None:
    """The tokens of a task's question, where the invented world asks it; those that are computed before the
    answer, in whole blocks of the cache; those with which all begin; and those of the longest."""
    task, options = named(spec)
    own = {key: value for key, value in options.items() if key not in Settings.model_fields}
    try:
        asked = list(world.questions(task, "test", seed=options.get("seed", seed), limit=ASKED, **own))
    except (TriviumError, TypeError):
        return None
    if tokenizer is None:
        sizes = [len(one.prompt) / bytes_per_token(vocabulary) + OF_A_TURN for one in asked]
        mean = float(np.mean(sizes))
        return mean, mean + BLOCK / 2, 0.0, max(sizes)
    asking = with_chat_template(tokenizer)
    every = [asking.encode_prompt([dict(said) for said in one.messages]) for one in asked]
    blocks = [in_blocks(len(one) - 1) for one in every]
    sizes = [len(one) for one in every]
    return float(np.mean(sizes)), float(np.mean(blocks)), float(_alike(every)), float(max(sizes))


def _alike(texts: Sequence[Sequence[int]]) -> int:
    """With how many tokens all texts begin."""
    return next((n for n, tokens in enumerate(zip(*texts)) if len(set(tokens)) > 1), min(map(len, texts)))


def solution_numbers(prepared: Run, name: str, checked: Checked, vocabulary: int) -> dict[str, float]:
    """The tokens and the steps of a solution, of those that a process reward model learns from."""
    stage: Any = prepared.nodes[name].stage
    tokenizer = tokenizer_of(prepared, name)
    sizes, steps = [], []
    for looked in checked.sources.get(name, {}).values():
        for row in looked.counted:
            listed = row.fields.get("completions")
            if not isinstance(listed, list) or not listed:
                continue
            text = stage.separator.join([*map(str, listed), ""])
            steps.append(len(listed))
            if tokenizer is None:
                said = "\n".join(texts_of([row.fields.get("prompt"), text]))
                sizes.append(len(said) / bytes_per_token(vocabulary))
            else:
                asked = prompt_ids(asked_of(row.fields, row.id), tokenizer, None, name)
                sizes.append(float(len(asked) + len(tokenizer.encode(text))))
    if not sizes:
        return {}
    return {"solution tokens": float(np.mean(sizes)), "steps of a solution": float(np.mean(steps))}


def synthesis_numbers(stage: Any, rows: float, prompt: float) -> dict[str, Any]:
    """Answers and tokens of a stage that writes data."""
    return {**stage.estimate(rows, prompt), "prompt tokens": max(1.0, prompt)}


def judging_numbers(stage: Any, sources: Mapping[str, Looked]) -> dict[str, float]:
    """Requests and tokens of a stage that has documents judged; a stage without a judge has none."""
    rows = [row for looked in sources.values() for row in looked.rows]
    sizes = [size for looked in sources.values() for size in looked.characters]
    documents = sum(looked.documents or 0 for looked in sources.values())
    known = [isinstance(row.fields.get(getattr(stage, "label", "")), int | float) for row in rows]
    return stage.judging(documents, float(np.mean(sizes)), float(np.mean(known))) if documents else {}


def online_numbers(stage: Any, prompts: int | None, prompt: float) -> dict[str, Any]:
    """Steps and answers of preferences that the model's own answers make."""
    steps = stage.steps or (round(stage.epochs * prompts / stage.pairs) if stage.epochs and prompts else None)
    if not steps:
        return {}
    answers = steps * stage.pairs * stage.online.num_generations
    return {
        "steps": steps, "answers": answers, "tokens at most": answers * stage.online.max_new_tokens,
        "prompt tokens": max(1.0, prompt), "prompts": prompts or 0,
    }  # fmt: skip


def _number(value: Any) -> str:
    """A number in a few characters; small whole ones as they were written."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 100_000:
        return f"{value:,}"
    return short(value) if isinstance(value, (int, float)) else str(value)


def in_one_line(numbers: Mapping[str, Any]) -> str:
    """The numbers, each with its name."""
    parts = []
    for name, value in numbers.items():
        if name in UNSAID or isinstance(value, (np.ndarray, tuple)):
            continue
        if name == "epochs" and isinstance(value, Mapping):
            parts += [f"{source} {passes:.3g} epochs" for source, passes in value.items()]
        elif not isinstance(value, Mapping):
            parts.append(f"{name} {_number(value)}")
    return ", ".join(parts)
