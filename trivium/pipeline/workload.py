"""What every stage computes, in the planner's terms: from its settings and the first rows of its data."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from trivium.evals.asking import GREETINGS, LONGEST_GREETING
from trivium.evals.settings import Settings, TaskSpec, named, settings_of
from trivium.generate.kv_cache import BLOCK, Cache, in_blocks, reach_for
from trivium.generate.prefill import CHUNK
from trivium.kit import machine as hardware
from trivium.lab.planner.work import Job, Phase
from trivium.learn.objectives.next_token import WORTH_LEAVING_OUT
from trivium.learn.settings import Parallel
from trivium.model.attention import padded_length
from trivium.model.config import ModelConfig
from trivium.model.flops import adapter_parameters, parameter_count
from trivium.model.growth import grown_config, probe
from trivium.pipeline.checks import PREFERENCES, PROMPTED, Checked
from trivium.pipeline.encoders import encoder_phases, modalities_of
from trivium.pipeline.looking import NO_ITEMS, OF_A_TURN
from trivium.pipeline.portions import Measured, attended
from trivium.pipeline.run import Run
from trivium.stages.label_steps import CHUNK as LABELLED_AT_ONCE
from trivium.stages.parts.gauges import DRIFT_TOKENS
from trivium.stages.parts.shapes import planned_shape

ANSWERED = 0.5
"""The share of `max_new_tokens` that an answer is taken to have."""
QUESTION = 48
"""Tokens of a question, where nothing tells."""
DEFAULT_ANSWER = 48
LONGEST_ANSWER = 1.5
"""How much longer than the mean the longest answer of a batch is."""
TEACHING = 0.5
"""The share of groups that is learnt from where rewards are compared within a group: the answers to some
prompts are all right or all wrong. How many is not known before."""
EVALUATED_AT_ONCE = 32
"""The default of an engine's `max_rows`."""
ASKED_AT_END = 64
"""Prompts on which the drift from another model is measured."""
SYCOPHANCY, CHOICE = 24, 8
"""The longest answer to a question of the sycophancy evaluation; tokens of one of its two choices."""

Numbers = Mapping[str, Any]


def config_of(prepared: Run, name: str, derived: Mapping[str, Numbers]) -> ModelConfig | None:
    """The shape of the model that a stage trains or asks, with the tokens and positions it is given."""
    stage: Any = prepared.nodes[name].stage
    own = planned_shape(derived.get(name))
    if own is not None and stage.kind in ("pretrain", "grow", "shrink"):
        return own
    start = (
        getattr(stage, "start", None)
        or getattr(stage, "asks", None)
        or next(iter(getattr(stage, "of", None) or []), None)
    )
    if not isinstance(start, str):
        return own
    config = _parent_config(prepared, name, start, derived)
    if config is None:
        return own
    added = getattr(getattr(stage, "vocabulary", None), "added", 0)
    longest = getattr(getattr(stage, "context", None), "longest", None)
    if stage.kind == "midtrain" and (added or longest):
        config = config.changed(
            vocabulary=config.vocabulary + added, context=max(config.context, longest or 0)
        )
    return config


def _parent_config(
    prepared: Run, name: str, start: str, derived: Mapping[str, Numbers]
) -> ModelConfig | None:
    parent = prepared.pending(name, start)
    if parent is not None:
        return config_of(prepared, parent, derived) if parent in derived else None
    return planned_shape(prepared.place_of(name, start))


def job_of(prepared: Run, name: str, derived: Mapping[str, Numbers], checked: Checked) -> Job:
    """The job of one stage; what is not known counts as nothing."""
    stage: Any = prepared.nodes[name].stage
    numbers = derived[name]
    characters = conversations = 0.0
    for source, one in checked.sources.get(name, {}).items():
        # A document of the invented world is written about as slowly as it is read.
        times = 2 if source.startswith("world:") else 1
        characters += times * sum(one.characters) / max(1, len(one.rows)) * (one.documents or 0)
        if one.rows and one.rows[0].text is None:
            # Of a pair both answers are laid into the template.
            conversations += (one.documents or 0) * (1 + (stage.kind in PREFERENCES))
    job = Job(name, stage.kind, characters=characters, conversations=conversations)
    config = config_of(prepared, name, derived)
    if config is not None:
        if numbers.get("items", NO_ITEMS) != NO_ITEMS:
            numbers = {**numbers, "modalities": modalities_of(prepared, name, config.width)}
        if stage.kind in ("grow", "shrink"):
            numbers = {**numbers, "parent": _parent_config(prepared, name, stage.start, derived)}
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
        parallel=None if stage.parallel == Parallel() else stage.parallel,
        divisible=adapter is None and config.query_key_norm != "full",
        float8=stage.precision == "float8", shares_prompts=stage.kind in (*PREFERENCES, *PROMPTED),
        kept_states=stage.checkpoint.keep, kept_models=1 + len(stage.checkpoint.at),
    )  # fmt: skip


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
    # A student computes no more than what it is taught, fine-tuning where that is little.
    few = (learned < WORTH_LEAVING_OUT or stage.kind == "distill") and config.experts is None
    phases: list[Phase] = []
    done, steps = 0.0, float(numbers.get("steps") or max(1.0, tokens / max(batch, 1.0)))
    shape = config
    if stage.kind == "pretrain" and getattr(stage, "grow", []):
        shape = stage._preset(config.vocabulary).config
    stretches: list[tuple[float, bool, Any]] = []
    if frozen := round(getattr(stage, "steps_frozen", 0.0) * steps):
        stretches.append((frozen, True, None))
    for point in getattr(stage, "grow", []):
        stretches.append((min(steps, point.step(round(steps), round(batch))), False, point))
    for until, still, point in [*stretches, (steps, False, None)]:
        part = tokens * (until - done) / steps
        phases.append(
            Phase(
                "training", part, length, part * learned, 0.0 if still else _share(stage),
                head_trained=not still and _share(stage) > 0, last_layer=part * learned if few else None,
                config=None if shape == config else shape, beside=_beside(stage, config), frozen=still,
            )
        )  # fmt: skip
        done = until
        if point is not None:
            shape = grown_config(shape, point)
    if numbers.get("modalities") is not None:
        phases += encoder_phases(
            numbers["modalities"], numbers["items"], numbers["items there"], tokens, steps,
            job.optimiser == "muon",
        )  # fmt: skip
    phases += _measured_phases(numbers, min(stage.validation.times, steps))
    if getattr(getattr(stage, "near_parent", None), "kl", 0):
        phases.append(Phase("scoring", tokens, length, tokens * learned))
        job = replace(job, copies=1)
    teacher = planned_shape({"model": numbers.get("teacher_model")})
    if teacher is not None:
        taught = tokens * learned
        last = taught if teacher.experts is None else None
        phases.append(Phase("scoring", tokens, length, taught, last_layer=last, config=teacher))
        held: Measured | None = numbers.get("measured")
        # How far the student still is from its teacher, on what is held out.
        for other in () if held is None else (config, teacher):
            assert held is not None
            last = held.predicted if other.experts is None else None
            phases.append(
                Phase("scoring", held.tokens, held.attended, held.predicted, last_layer=last, config=other)
            )
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
    if getattr(stage, "online", None) is not None and "pair tokens" not in numbers:
        return _online(stage, job, config, numbers)
    if getattr(stage, "process", False):
        return _solutions(stage, job, config, numbers)
    steps, pairs = numbers.get("steps"), numbers.get("pairs")
    prompt, answers = numbers.get("pair tokens", (0.0, 0.0))
    if not steps or not pairs or not answers:
        return job
    each, length = _pair(stage, prompt, answers)
    tokens, learned = pairs * each, pairs * answers
    reads = stage.kind == "preference"
    few = None if config.experts is not None else learned if reads else 3.0 * pairs
    phases = [
        Phase("training", tokens, length, learned if reads else 0.0, _share(stage),
              head_trained=_share(stage) > 0, last_layer=few, head_again=reads, beside=_beside(stage, config))
    ]  # fmt: skip
    once = float(numbers.get("pairs there", pairs))
    held = float(numbers.get("pairs held out", 0.0))
    prompt_held, answers_held = numbers.get("held pair tokens", (prompt, answers))
    each_held, length_held = _pair(stage, prompt_held, answers_held)
    beside = reads and stage._beside() != "none"
    if beside:
        # Stored numbers are computed once; those of a model beside in every step.
        count = pairs if stage._beside() != "stored" else once
        phases.append(Phase("scoring", count * each, length, count * answers, last_layer=count * answers))
    for _ in range(1 + beside if held else 0):
        scored = held * answers_held if reads else 0.0
        last = None if config.experts is not None else scored if reads else 3.0 * held
        phases.append(Phase("scoring", held * each_held, length_held, scored, last_layer=last))
    if reads:
        # Of given pairs those held out are asked, of prompts any.
        asked = float(numbers.get("prompts", held))
        phases += _gauged(stage, asked, prompt_held if held else prompt, answers / 2, numbers)
    copies = int(reads and stage._beside() == "parent")
    return replace(
        job, phases=tuple(phases), steps=float(steps), tokens=tokens, batch=tokens / steps, copies=copies,
        context=int(max(each, 2)),
    )  # fmt: skip


def _pair(stage: Any, prompt: float, answers: float) -> tuple[float, float]:
    """The tokens of a pair, and the keys that each of them meets."""
    if getattr(stage, "share_prompts", False):
        return branched(prompt, [answers / 2] * 2, _on_processor())
    return 2 * prompt + answers, branched(prompt + answers / 2, [], _on_processor())[1]


def _solutions(stage: Any, job: Job, config: ModelConfig, numbers: Numbers) -> Job:
    """Process reward models: every step of a solution gets a score at its last token."""
    steps, count = numbers.get("steps"), numbers.get("pairs")
    length = float(numbers.get("solution tokens") or 0.0)
    if not steps or not count or not length:
        return job
    marks = float(numbers.get("steps of a solution", STEPS))
    met = branched(length, [], _on_processor())[1]
    held = float(numbers.get("pairs held out", 0.0))
    few = None if config.experts is not None else count * marks
    phases = [Phase("training", count * length, met, 0.0, _share(stage), last_layer=few,
                    beside=_beside(stage, config))]  # fmt: skip
    if held:
        phases.append(Phase("scoring", held * length, met, 0.0, last_layer=few and held * marks))
    return replace(job, phases=tuple(phases), steps=float(steps), tokens=count * length,
                   batch=count * length / steps, context=int(max(length, 2)))  # fmt: skip


def _gauged(stage: Any, asked: float, prompt: float, answer: float, numbers: Numbers) -> list[Phase]:
    """What preferences are measured by at the end: the drift from the parent, and sycophancy."""
    asked = min(asked, ASKED_AT_END)
    most = max(0.0, min(float(DRIFT_TOKENS), float(numbers.get("context", DRIFT_TOKENS)) - prompt))
    answer = min(float(numbers.get("answer tokens", answer)), most)
    phases = drifted(asked, prompt, answer, most) if asked else []
    return phases + sycophancy(stage.sycophancy, numbers, answer) if stage.sycophancy else phases


def drifted(asked: float, prompt: float, answer: float, most: float) -> list[Phase]:
    """The drift from another model: prompts are answered, and the other reads the answers."""
    whole, length = branched(prompt + answer, [], _on_processor())
    return [
        *generated(asked, prompt, 1, asked, answer, most, EVALUATED_AT_ONCE),
        Phase("scoring", asked * whole, length, asked * answer),
    ]


def sycophancy(questions: float, numbers: Numbers, answer: float) -> list[Phase]:
    """Each question is asked plainly, under pressure and with a correction, and two answers are compared."""
    *prompts, choices = numbers.get("sycophancy tokens", (QUESTION, QUESTION, QUESTION, 2 * CHOICE))
    phases: list[Phase] = [*greeted(answer)]
    for prompt in prompts:
        phases += generated(
            questions, prompt, 1, questions, min(answer, SYCOPHANCY), SYCOPHANCY, EVALUATED_AT_ONCE
        )
    # Both answers are read after one reading of the question that presses.
    whole, length = branched(prompts[1] + choices, [], _on_processor())
    return [*phases, Phase("scoring", questions * whole, length, questions * choices)]


def _beside(stage: Any, config: ModelConfig) -> float:
    adapter = getattr(stage, "adapter", None)
    return 0.0 if adapter is None else adapter_parameters(config, adapter.rank)


def decoded(calls: float, answers: float, answer: float, most: float, rows: float) -> float:
    """Decoding steps of `calls` batches of answers, `rows` at once, until the longest of each has ended."""
    waves = max(1.0, answers / max(rows, 1.0))
    longest = min(most, LONGEST_ANSWER * answer)
    return calls * (waves * answer + max(0.0, longest - answer))


def generated(
    prompts: float,
    prompt: float,
    calls: float,
    answers: float,
    answer: float,
    most: float,
    rows: float,
    shared: float = 0.0,
    blocks: float | None = None,
    longest: float = 0.0,
) -> tuple[Phase, Phase]:
    """Prompts are read, each once, and answered in `calls` batches of `answers` of at most `most` tokens.

    The whole blocks of the `shared` tokens with which all prompts begin are read with the first alone.
    `blocks` are the tokens of a prompt in whole blocks, where its mean length does not tell. Rows that are
    decoded together read the cache as far as that of the `longest` prompt."""
    answer = min(answer, most)
    written = calls * answers * answer
    rows = max(1.0, min(rows, answers))
    steps = decoded(calls, answers, answer, most, rows)
    # The last token of a prompt is read where the first of the answer is written.
    read, length = prefilled(prompt - 1) if blocks is None else (blocks, blocks)
    read *= prompts
    read -= max(0.0, prompts - calls) * min(read, shared // BLOCK * BLOCK)
    return (
        Phase("generation", read, length, 0.0, last_layer=0.0, rows=1.0, requests=calls * answers),
        Phase("generation", written, max(prompt, longest) + (answer + BLOCK) / 2, written, decode_steps=steps,
              rows=written / max(steps, 1.0)),
    )  # fmt: skip


def cached(rows: float, length: float) -> float:
    """Places of the cache for rows of this length at most; while it doubles, the old half stays as well."""
    return 1.5 * rows * Cache.capacity_for(round(length))


def prefilled(prompt: float) -> tuple[float, float]:
    """The tokens computed of a prompt, in whole blocks of the cache, and the keys that each of them meets."""
    tokens = in_blocks(max(0, round(prompt)))
    pieces = [(min(CHUNK, tokens - start), min(start + CHUNK, tokens)) for start in range(0, tokens, CHUNK)]
    return float(tokens), sum(count * reach_for(end) for count, end in pieces) / max(1.0, tokens)


def _rollouts(stage: Any, job: Job, config: ModelConfig, numbers: Numbers) -> Job:
    """Reinforcement learning: completions are generated, scored by the reference and learned from."""
    steps, answers = numbers.get("steps"), numbers.get("answers")
    if not steps or not answers:
        return job
    prompt = float(numbers.get("prompt tokens", QUESTION))
    answer = min(
        float(stage.max_new_tokens), float(numbers.get("answer tokens", ANSWERED * stage.max_new_tokens))
    )
    group = max(1, stage.num_generations)
    padded = _on_processor() and config.experts is None
    each, length = branched(prompt, [answer] * (group if stage.share_prompts else 1), _on_processor())
    read = answers * each / (group if stage.share_prompts else 1)
    calls = max(1.0, answers / (stage.prompts_per_step * group))
    rows = float(min(stage.max_rows, stage.prompts_per_step * group))
    share, passes, written = _share(stage), stage.epochs_per_rollout, answers * answer
    ppo = stage.kind == "ppo"
    teaching = float(numbers.get("teaching", 1.0 if _learns_from_all(stage) else TEACHING))
    trimmed = written if padded and ppo else None
    phases = [
        *generated(answers / group, prompt, calls, answers / calls, answer, stage.max_new_tokens, rows),
        Phase(
            "training", teaching * passes * read, length, teaching * passes * written, share,
            head_trained=share > 0, last_layer=None if trimmed is None else passes * trimmed, head_again=True,
            beside=_beside(stage, config),
        ),
    ]  # fmt: skip
    reference = ppo or bool(stage.kl.coefficient)
    if reference:
        phases.append(Phase("scoring", read, length, written))
    if ppo and stage.estimator == "gae":
        phases.append(Phase("scoring", read, length, written, last_layer=trimmed))
    if getattr(stage, "correction", "none") != "none":
        phases.append(Phase("scoring", teaching * read, length, teaching * written))
    if ppo and stage.sycophancy:
        phases += sycophancy(stage.sycophancy, numbers, answer)
    return replace(
        job, phases=tuple(phases), steps=float(steps), tokens=written, batch=passes * read / steps,
        context=int(prompt + stage.max_new_tokens), copies=int(reference and share > 0),
        cached_tokens=cached(rows, prompt + stage.max_new_tokens),
    )  # fmt: skip


def _learns_from_all(stage: Any) -> bool:
    """Whether groups with equal rewards teach: by other terms of the loss, or as nothing is compared."""
    if stage.kind == "ppo":
        return stage.estimator != "rloo"
    held = stage.kl.coefficient > 0 and stage.kl.into == "loss"
    return (
        held
        or stage.entropy_bonus > 0
        or stage.algorithm == "reinforce"
        or stage.dynamic_sampling_retries > 0
    )


def _asked(stage: Any, job: Job, config: ModelConfig, numbers: Numbers) -> Job:
    """Evaluation: questions are answered, some of them several times."""
    phases: list[Phase] = []
    reserved = 0.0
    known = numbers.get("answer tokens")
    if stage.kind == "compare":
        questions = float(numbers.get("questions", 100))
        prompt = float(numbers.get("prompt tokens", QUESTION))
        answer = min(stage.max_new_tokens, float(known or ANSWERED * stage.max_new_tokens))
        several = 1 if stage.best_of is None else stage.best_of.n
        reserved = prompt + stage.max_new_tokens
        for times in (several, 1):
            phases += generated(
                questions, prompt, 1, questions * times, answer, stage.max_new_tokens, EVALUATED_AT_ONCE
            )
        if stage.best_of is None:
            phases += drifted(min(questions, ASKED_AT_END), prompt, answer, stage.max_new_tokens)
    else:
        if any(settings_for(stage.asking, spec).style == "auto" for spec in stage.on):
            phases += greeted(float(known or DEFAULT_ANSWER))
        for spec in stage.on:
            asking = settings_for(stage.asking, spec)
            most = float(asking.max_new_tokens or 2 * DEFAULT_ANSWER)
            answer = min(most, float(known or (ANSWERED * most if asking.max_new_tokens else DEFAULT_ANSWER)))
            prompt, times = float(numbers.get("prompt tokens", QUESTION)), 1 + asking.samples
            reserved = max(reserved, max(prompt, float(numbers.get("longest prompt", 0.0))) + most)
            phases += generated(
                asking.limit, prompt, 1, asking.limit * times, answer, most, EVALUATED_AT_ONCE,
                float(numbers.get("shared tokens", 0.0)), numbers.get("prompt blocks"),
                float(numbers.get("longest prompt", 0.0)),
            )  # fmt: skip
    written = sum(phase.predicted for phase in phases if phase.decode_steps)
    return replace(
        job, phases=tuple(phases), tokens=written, copies=int(stage.kind == "compare"),
        cached_tokens=cached(EVALUATED_AT_ONCE, reserved),
    )  # fmt: skip


def greeted(answer: float) -> tuple[Phase, Phase]:
    """A few greetings, from whose answers it is told whether the model ends its turns."""
    asked = len(GREETINGS)
    prompt = float(np.mean([len(one) for one in GREETINGS])) / 4 + OF_A_TURN
    return generated(asked, prompt, 1, asked, answer, LONGEST_GREETING, EVALUATED_AT_ONCE)


def settings_for(common: Settings, spec: TaskSpec) -> Settings:
    """How one task is asked: as all are, unless it says so itself."""
    _, options = named(spec)
    own = {key: value for key, value in options.items() if key in Settings.model_fields}
    return settings_of("on", {**common.model_dump(exclude_unset=True), **own})


def _measured(stage: Any, job: Job, config: ModelConfig, numbers: Numbers) -> Job:
    """Kinds that measure models on what their data hold out."""
    if stage.kind == "merge":
        # A greedy merge is measured with every further ingredient as well.
        times = 1 + len(stage.of) + (len(stage.of) - 1) * (stage.method == "greedy")
    else:
        # Rounding: the loss and the accuracy, before and after. Anneals: the parent and every candidate.
        times = 4 if stage.kind == "quantize" else 1 + len(stage.candidates)
    phases = _measured_phases(numbers, times)
    return replace(
        job, phases=tuple(phases), tokens=sum(one.tokens for one in phases), trained_parameters=0.0
    )


def _measured_phases(numbers: Numbers, times: float) -> list[Phase]:
    """Passes over what is held out, so many times."""
    one = numbers.get("measured")
    if one is None or not times:
        return []
    return [Phase("scoring", times * one.tokens, one.attended, times * one.predicted)]


def _pruned(stage: Any, job: Job, config: ModelConfig, numbers: Numbers) -> Job:
    """Shrinking: importance is measured in one pass of the model as it was."""
    one, parent = numbers.get("measured"), numbers.get("parent")
    if stage.data is None or parent is None or one is None:
        return job
    # A row is read as one text, whatever documents are packed into it.
    read = Phase("scoring", one.tokens, one.attended_in_rows, 0.0, config=parent)
    return replace(job, phases=(read,), tokens=one.tokens)


def _grown(stage: Any, job: Job, config: ModelConfig, numbers: Numbers) -> Job:
    """Growing: the logits before and after are compared on a few texts."""
    before = numbers.get("parent")
    if before is None:
        return job
    sizes = [len(one) for one in probe(config.vocabulary, min(before.reach, config.reach))]
    sizes.append(round(numbers.get("probe tokens", 64)))
    tokens, length = float(sum(sizes)), attended(np.array(sizes), _on_processor())
    phases = tuple(Phase("scoring", tokens, length, tokens, config=one) for one in (before, None))
    return replace(job, phases=phases, tokens=2 * tokens)


STEPS = 3.0
"""Steps of a solution, where nothing tells."""


def _labelled(stage: Any, job: Job, config: ModelConfig, numbers: Numbers) -> Job:
    """Labelling steps: problems are solved, and gone on from the ends of steps, from half-way in the mean."""
    problems = float(numbers.get("questions") or 0.0)
    if not problems:
        return job
    prompt, most = float(numbers.get("prompt tokens", QUESTION)), stage.max_new_tokens
    answer = min(most, float(numbers.get("answer tokens", ANSWERED * most)))
    solutions = problems * stage.num_generations
    calls = max(1.0, problems / LABELLED_AT_ONCE)
    phases = [*generated(problems, prompt, calls, solutions / calls, answer, most, stage.max_rows)]
    steps = float(numbers.get("steps of a solution", STEPS))
    prefixes = 0.0 if stage.labels in ("exact", "outcome") else solutions * max(0.0, steps - 1)
    if stage.labels == "hard" and stage.locate == "first_error":
        prefixes = solutions * np.log2(max(1.0, steps))
    if prefixes:
        draws = prefixes * stage.rollouts / calls
        phases += generated(prefixes, prompt + answer / 2, calls, draws, answer / 2, most / 2, stage.max_rows)
    written = sum(one.predicted for one in phases)
    return replace(
        job, phases=tuple(phases), tokens=written, cached_tokens=cached(stage.max_rows, prompt + most)
    )


def _written(stage: Any, job: Job, config: ModelConfig, numbers: Numbers) -> Job:
    """Synthesis: every step that asks the model, as one batch of answers; a judge of documents likewise."""
    answers = float(numbers.get("answers") or numbers.get("requests") or 0.0)
    every = float(numbers.get("tokens at most") or 0.0)
    at_once = getattr(stage, "max_rows", EVALUATED_AT_ONCE)
    if not answers or not (getattr(stage, "start", None) or getattr(stage, "asks", None)):
        return job
    prompt = float(numbers.get("prompt tokens", QUESTION))
    most = max(1.0, every / answers - prompt)
    answer = float(numbers.get("answer tokens", ANSWERED * most))
    phases = generated(answers, prompt, 1, answers, answer, most, at_once)
    return replace(job, phases=phases, tokens=answers * min(answer, most),
                   cached_tokens=cached(at_once, prompt + most))  # fmt: skip


def _online(stage: Any, job: Job, config: ModelConfig, numbers: Numbers) -> Job:
    """Preferences between answers that the model writes: two of each prompt are learnt from."""
    steps, answers = numbers.get("steps"), numbers.get("answers")
    if not steps or not answers:
        return job
    prompt, most = float(numbers.get("prompt tokens", QUESTION)), stage.online.max_new_tokens
    answer = min(float(most), float(numbers.get("answer tokens", ANSWERED * most)))
    prompts = stage.pairs * steps
    rows = min(stage.online.max_rows, answers / steps)
    phases = [*generated(prompts, prompt, steps, answers / steps, answer, most, rows)]
    # Where all answers to a prompt are worth the same there is no pair.
    pairs = prompts * float(numbers.get("teaching", 1.0 if stage.online.num_generations > 2 else TEACHING))
    learnt = {"steps": steps, "pairs": pairs, "pairs there": pairs, "pair tokens": (prompt, 2 * answer)}
    rest = _pairs(stage, job, config, {**numbers, **learnt})
    return replace(
        rest, phases=(*phases, *rest.phases), cached_tokens=cached(rows, prompt + most),
        batch=rest.tokens / steps,
    )  # fmt: skip


MAKERS = {
    "preference": _pairs, "reward": _pairs, "rlvr": _rollouts, "ppo": _rollouts, "evaluate": _asked,
    "compare": _asked, "quantize": _measured, "merge": _measured, "grow": _grown, "shrink": _pruned,
    "anneals": _measured,
    "label_steps": _labelled, "synthesize": _written, "quality_classifier": _written, "curate": _written,
}  # fmt: skip
