"""What every stage computes, in the planner's terms: from its settings and the first rows of its data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from trivium.kit import machine as hardware
from trivium.lab.planner.work import Job, Phase
from trivium.learn.objectives.next_token import WORTH_LEAVING_OUT
from trivium.model.attention import padded_length
from trivium.model.config import ModelConfig
from trivium.model.flops import parameter_count
from trivium.model.folder import load_config
from trivium.model.growth import grown_config
from trivium.model.hub import resolve
from trivium.pipeline.checks import Checked
from trivium.pipeline.run import Run
from trivium.recipe.outside import locate
from trivium.stages.parts.shapes import planned_shape

ANSWERED = 0.5
"""The share of `max_new_tokens` that an answer is taken to have."""
QUESTION = 48
"""Tokens of a question, where nothing tells."""
DEFAULT_ANSWER = 48
EVALUATED_AT_ONCE = 64

Numbers = Mapping[str, Any]


def config_of(going: Run, name: str, derived: Mapping[str, Numbers]) -> ModelConfig | None:
    """The shape of the model that a stage trains or asks, with the tokens and positions it is given."""
    stage: Any = going.nodes[name].stage
    own = planned_shape(derived.get(name))
    if own is not None and stage.kind in ("pretrain", "grow", "shrink"):
        return own
    start = getattr(stage, "start", None) or next(iter(getattr(stage, "of", None) or []), None)
    if not isinstance(start, str):
        return own
    config = _parent_config(going, name, start, derived)
    if config is None:
        return own
    added = getattr(getattr(stage, "vocabulary", None), "added", 0)
    longest = getattr(getattr(stage, "context", None), "longest", None)
    if stage.kind == "midtrain" and (added or longest):
        config = config.changed(
            vocabulary=config.vocabulary + added, context=max(config.context, longest or 0)
        )
    return config


def _parent_config(going: Run, name: str, start: str, derived: Mapping[str, Numbers]) -> ModelConfig | None:
    parent = going.nodes[name].parents.get(start)
    if parent is not None and going.entry(parent.stage).state != "done":
        return config_of(going, parent.stage, derived) if parent.stage in derived else None
    place = going.entry(parent.stage).output if parent is not None else locate(start, going.recipe.base)
    if place is None:
        return None
    folder = resolve(place) if place.is_dir() else place
    return load_config(folder) if (folder / "config.json").is_file() else None


def job_of(going: Run, name: str, derived: Mapping[str, Numbers], checked: Checked) -> Job:
    """The job of one stage; what is not known counts as nothing."""
    stage: Any = going.nodes[name].stage
    numbers = derived[name]
    looked = checked.sources.get(name, {}).values()
    characters = sum(sum(one.characters) / max(1, len(one.rows)) * (one.documents or 0) for one in looked)
    job = Job(name, stage.kind, characters=characters)
    config = config_of(going, name, derived)
    if config is not None:
        job = _with_model(stage, job, config, numbers)
    # A kind of a person's own says itself what it computes.
    if not job.phases and numbers.get("flops"):
        tokens = numbers.get("tokens") or numbers.get("tokens at most") or 0.0
        job = replace(job, told=float(numbers["flops"]), tokens=float(tokens))
    return job


def _with_model(stage: Any, job: Job, config: ModelConfig, numbers: Numbers) -> Job:
    job = replace(job, config=config)
    if hasattr(stage, "learning_rate"):
        job = _trained(stage, job, config)
    make = MAKERS.get(stage.kind)
    if make is not None:
        return make(stage, job, config, numbers)
    if job.trained_parameters and numbers.get("tokens"):
        return _documents(stage, job, config, numbers)
    return job


def _trained(stage: Any, job: Job, config: ModelConfig) -> Job:
    """Which weights have a gradient, and how their state is kept."""
    whole = parameter_count(config)
    trained = float(whole)
    adapter = getattr(stage, "adapter", None)
    if adapter is not None:
        trained = adapter_parameters(config, adapter.rank)
    return replace(
        job, trained_parameters=trained, optimiser=stage.optimiser, recompute=stage.recompute,
        kept_states=stage.checkpoint.keep, kept_models=1 + len(stage.checkpoint.at),
    )  # fmt: skip


def adapter_parameters(config: ModelConfig, rank: int) -> float:
    """Two thin matrices beside each of the layers' products."""
    queries, keys = config.heads * config.head_width, config.key_value_heads * config.head_width
    sides = [(config.width, queries), (config.width, keys), (config.width, keys), (queries, config.width)]
    inner = [(config.width, config.inner_width)] * (2 if config.gated else 1)
    sides += [*inner, (config.inner_width, config.width)]
    return float(config.layers * rank * sum(a + b for a, b in sides))


def _share(stage: Any) -> float:
    """The share of the layers' weights that get a gradient."""
    return 0.0 if getattr(stage, "adapter", None) is not None else 1.0


def _documents(stage: Any, job: Job, config: ModelConfig, numbers: Numbers) -> Job:
    """Training on packed sequences, with the validation along the way."""
    tokens = float(numbers["tokens"])
    batch = float(numbers.get("batch") or stage.batch or 0.0)
    context = int(numbers.get("longest") or numbers.get("context") or config.context)
    length = float(numbers.get("attended") or context)
    learned = float(numbers.get("learned", 1.0 - 1.0 / max(2.0, length)))
    few = learned < WORTH_LEAVING_OUT and config.experts is None
    phases: list[Phase] = []
    done, steps = 0.0, float(numbers.get("steps") or max(1.0, tokens / max(batch, 1.0)))
    shape = config
    if stage.kind == "pretrain" and getattr(stage, "grow", []):
        shape = stage._preset(config.vocabulary).config
    for point in [*getattr(stage, "grow", []), None]:
        until = steps if point is None else min(steps, point.step(round(steps), round(batch)))
        part = tokens * (until - done) / steps
        phases.append(
            Phase(
                "training",
                part,
                length,
                part * learned,
                _share(stage),
                head_trained=_share(stage) > 0,
                last_layer=part * learned if few else None,
                config=None if shape == config else shape,
                beside=_beside(stage, config),
            )
        )
        if point is not None:
            shape, done = grown_config(shape, point), until
    validation = getattr(stage, "validation", None)
    held = numbers.get("validation tokens", 0.0)
    if validation is not None and held:
        seen = validation.times * min(float(held), float(validation.tokens) * numbers.get("sources", 1))
        phases.append(Phase("scoring", seen, length, seen * learned))
    if getattr(getattr(stage, "near_parent", None), "kl", 0):
        phases.append(Phase("scoring", tokens, length, tokens * learned))
        job = replace(job, copies=1)
    teacher = planned_shape({"model": numbers.get("teacher_model")})
    if teacher is not None:
        phases.append(Phase("scoring", tokens, length, tokens * learned, config=teacher))
    return replace(
        job, phases=tuple(phases), steps=steps, tokens=tokens, batch=batch or tokens / steps, context=context
    )


def branched(prompt: float, answers: Sequence[float], padded: bool) -> tuple[float, float]:
    """Tokens of a prompt and the answers that go on from it, and how many keys each of them meets.

    The prompt is computed once and its last token again with every answer."""
    if len(answers) < 2:
        whole = prompt + sum(answers)
        return whole, float(padded_length(round(whole))) ** 2 / max(1.0, whole) if padded else whole
    size = (lambda length: float(padded_length(max(1, round(length))))) if padded else (lambda length: length)
    own, tokens = max(prompt - 1, 1.0), max(prompt - 1, 1.0) + sum(one + 1 for one in answers)
    squares = size(own) ** 2 + sum(size(one + 1) * (size(own) + size(one + 1)) for one in answers)
    return tokens, squares / max(1.0, tokens)


def _on_processor() -> bool:
    return not hardware.device().startswith("cuda")


def _pairs(stage: Any, job: Job, config: ModelConfig, numbers: Numbers) -> Job:
    """Preferences and reward models: pairs are learned from; of preferences a reference reads them once."""
    steps, pairs = numbers.get("steps"), numbers.get("pairs")
    prompt, answers = numbers.get("pair tokens", (0.0, 0.0))
    if not steps or not pairs or not answers:
        return job
    if getattr(stage, "share_prompts", False):
        each, length = branched(prompt, [answers / 2] * 2, _on_processor())
    else:
        (_, length), each = branched(prompt + answers / 2, [], _on_processor()), 2 * prompt + answers
    tokens, learned = pairs * each, pairs * answers
    reads = stage.kind == "preference"
    few = None if config.experts is not None else learned if reads else 3.0 * pairs
    found = [
        Phase(
            "training",
            tokens,
            length,
            learned if reads else 0.0,
            _share(stage),
            head_trained=_share(stage) > 0,
            last_layer=few,
            head_again=reads,
            beside=_beside(stage, config),
        )
    ]
    once = numbers.get("pairs there", pairs)
    if reads and stage._beside() != "none":
        # Stored numbers are computed once; those of a model beside in every step.
        count = pairs if stage._beside() != "stored" else once
        found.append(Phase("scoring", count * each, length, count * answers, last_layer=count * answers))
    copies = int(reads and stage._beside() == "parent")
    return replace(
        job, phases=tuple(found), steps=float(steps), tokens=tokens, batch=tokens / steps, copies=copies,
        context=int(max(each, 2)),
    )  # fmt: skip


def _beside(stage: Any, config: ModelConfig) -> float:
    adapter = getattr(stage, "adapter", None)
    return 0.0 if adapter is None else adapter_parameters(config, adapter.rank)


def _rollouts(stage: Any, job: Job, config: ModelConfig, numbers: Numbers) -> Job:
    """Reinforcement learning: completions are generated, scored by the reference and learned from."""
    steps, answers = numbers.get("steps"), numbers.get("answers")
    if not steps or not answers:
        return job
    prompt = float(numbers.get("prompt tokens", QUESTION))
    answer = float(numbers.get("answer tokens", ANSWERED * stage.max_new_tokens))
    group = max(1, stage.num_generations)
    shared = group if stage.share_prompts else 1
    each, length = branched(prompt, [answer] * shared, _on_processor())
    written, read = answers * answer, answers * each / shared
    rows = float(min(stage.max_rows, stage.prompts_per_step * group))
    kl = getattr(getattr(stage, "kl", None), "coefficient", 0.0) or 0.0
    critic = stage.kind == "ppo" and getattr(stage, "estimator", "gae") == "gae"
    share, passes = _share(stage), stage.epochs_per_rollout
    met = prompt + answer / 2
    few = None if critic or config.experts is not None else written
    phases = [
        Phase("generation", answers / group * prompt, prompt, answers / group),
        Phase("generation", written, met, written, decode_steps=written / rows, rows=rows),
        Phase(
            "training", passes * read, length, passes * written, share, head_trained=share > 0,
            last_layer=None if few is None else passes * few, head_again=True, beside=_beside(stage, config),
        ),
    ]  # fmt: skip
    if kl:
        phases.append(Phase("scoring", read, length, written, last_layer=few))
    if critic:
        phases.append(Phase("scoring", read, length, 0.0))
    return replace(
        job, phases=tuple(phases), steps=float(steps), tokens=written, batch=passes * read / steps,
        context=int(prompt + stage.max_new_tokens), copies=int(bool(kl) and share > 0),
        cached_tokens=rows * (prompt + stage.max_new_tokens),
    )  # fmt: skip


def _asked(stage: Any, job: Job, config: ModelConfig, numbers: Numbers) -> Job:
    """Evaluation: questions are answered, some of them several times."""
    asking = getattr(stage, "asking", None)
    if asking is None:
        questions, several = float(numbers.get("questions", 100)), 2.0
    else:
        questions, several = float(asking.limit * len(stage.on)), 1.0 + asking.samples
        several = max(several, 1.0 + max((_samples(one) for one in stage.on), default=0.0))
    longest = getattr(stage, "max_new_tokens", None) or getattr(asking, "max_new_tokens", None)
    answer = ANSWERED * longest if longest else float(DEFAULT_ANSWER)
    written = questions * several * answer
    rows = float(EVALUATED_AT_ONCE)
    phases = (
        Phase("generation", questions * QUESTION, QUESTION, questions),
        Phase("generation", written, QUESTION + answer / 2, written, decode_steps=written / rows, rows=rows),
    )
    return replace(job, phases=phases, tokens=written, cached_tokens=rows * (QUESTION + answer))


def _samples(spec: Any) -> float:
    if isinstance(spec, Mapping):
        return float(spec.get("samples", 0) or 0)
    _, _, value = str(spec).partition("samples=")
    return float(value.partition("&")[0]) if value else 0.0


def _measured(stage: Any, job: Job, config: ModelConfig, numbers: Numbers) -> Job:
    """Quantisation and merging: the loss on held-out text, before and after, or of every ingredient."""
    times = 2 + 2 if stage.kind == "quantize" else 1 + len(stage.of)
    tokens = float(getattr(stage, "validation_tokens", 32768)) * times
    length = float(min(getattr(stage, "context", 512) or 512, config.context))
    return replace(job, phases=(Phase("scoring", tokens, length, tokens),), tokens=tokens)


MAKERS = {
    "preference": _pairs, "reward": _pairs, "rlvr": _rollouts, "ppo": _rollouts, "evaluate": _asked,
    "compare": _asked, "quantize": _measured, "merge": _measured,
}  # fmt: skip


def attended(lengths: np.ndarray, padded: bool) -> float:
    """How many keys a token meets on average, in documents of these lengths.

    A processor's kernel computes documents of several lengths in groups, each padded to the group's."""
    lengths = np.asarray(lengths, dtype=np.float64)
    squares = lengths**2
    if padded and len(set(lengths.tolist())) > 1:
        squares = np.array([float(padded_length(int(one))) ** 2 for one in lengths])
    return float(squares.sum() / max(1.0, lengths.sum()))
