"""Every kind of stage: the FLOPs that are planned, and those that its record has, are those torch counts.

How long a model's answers are is not known before. Here no model ends one, and the plan is made for that.
Nor are rows padded to numbers that this machine computes alike, which another machine would do otherwise.
"""

from __future__ import annotations

import json
import wave
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import trivium
from trivium.generate import exactness
from trivium.pipeline.checks import Checked
from trivium.pipeline.plan import planned
from trivium.pipeline.workload import job_of
from trivium.stages import kinds
from trivium.tokens.tokenizer import Tokenizer

MODEL = "depth: 2, width: 64, head_width: 16"

LEARNED = "batch: 512, context: 128"
INPUTS = f"""
  words: {{kind: tokenizer, data: ./texts.jsonl, vocabulary: 300}}
  corpus: {{kind: corpus, data: ./texts.jsonl, tokenizer: words, validation: 0.1}}
  base: {{kind: pretrain, data: corpus, model: {{{MODEL}}}, context: 256, batch: 1024, tokens: 4k}}
  second: {{kind: pretrain, data: corpus, model: {{{MODEL}}}, context: 256, batch: 1024, steps: 1, seed: 2}}
  third: {{kind: pretrain, data: corpus, model: {{{MODEL}}}, context: 256, batch: 1024, steps: 1, seed: 3}}
  deep: {{kind: grow, from: base, layers: 4, method: identity}}
  sft: {{kind: sft, from: base, data: ./chats.jsonl, {LEARNED}, steps: 2}}
"""
# With the ten tokens of a prompt two groups of sixteen: documents that differ would be padded to them.
ASKED = "data: ./problems.jsonl, max_new_tokens: 22"


@dataclass(frozen=True)
class Case:
    """One stage of a kind, and how near its plan and its record come to the counter."""

    settings: str
    needs: tuple[str, ...] = ()
    within: float = 0.01
    """Of the plan."""
    recorded: float = 0.002
    """Of the record."""
    numbers: Mapping[str, Any] = field(default_factory=dict)
    """What the plan cannot know and turns out so here."""


CASES = {
    "pretrain": Case(
        f"data: ./texts.jsonl, tokenizer: words, model: {{{MODEL}}}, context: 256, batch: 1024, tokens: 4k, "
        "validation: {times: 2, tokens: 512}", ("words",),
    ),
    "pretrain, adamw, grown": Case(
        f"data: corpus, model: {{{MODEL}}}, context: 128, batch: 1024, tokens: 8k, optimiser: adamw, "
        "grow: [{at: 50%, layers: 4, method: identity}]", ("corpus",),
    ),
    "midtrain": Case(
        "from: base, data: {./more.jsonl: {weight: 1, validation: 0.1}}, replay: 0.25, "
        "context: {length: 512, method: yarn}, batch: 2048, steps: 6, validation: {times: 1}", ("base",),
    ),
    "sft": Case(f"from: base, data: ./chats.jsonl, {LEARNED}, epochs: 1", ("base",)),
    "sft, lora": Case(
        f"from: base, data: ./chats.jsonl, {LEARNED}, epochs: 1, adapter: {{rank: 4}}", ("base",)
    ),
    "sft, replay": Case(
        f"from: base, data: ./chats.jsonl, {LEARNED}, steps: 4, replay: 0.5", ("base",)
    ),
    "distill": Case(f"from: base, teacher: sft, data: ./chats.jsonl, {LEARNED}, epochs: 1", ("base", "sft")),
    "multimodal": Case(
        f"from: sft, data: ./pictures.jsonl, {LEARNED}, steps: 3, steps_frozen: 0.34, "
        "picture: {patch: 4, tokens: 4, layers: 1, width: 32}", ("sft",),
    ),
    "multimodal, sounds": Case(
        f"from: sft, data: {{./sounds.jsonl: {{weight: 0.7}}, ./chats.jsonl: {{weight: 0.3}}}}, {LEARNED}, "
        "epochs: 2, sound: {layers: 1, width: 32, mels: 16, tokens_per_second: 25, train_encoder: false}",
        ("sft",),
    ),
    "preference": Case(
        "from: sft, data: {./pairs.jsonl: {validation: 0.3}}, context: 256, epochs: 1, pairs: 8, "
        "sycophancy: 0",
        ("sft",),
    ),
    "preference, online": Case(
        "from: sft, data: ./problems.jsonl, online: {max_new_tokens: 16, num_generations: 2}, pairs: 16, "
        "reward: [mine.py:score], steps: 2, sycophancy: 0", ("sft",),
    ),
    "reward": Case("from: sft, data: ./pairs.jsonl, context: 128, epochs: 1, pairs: 8", ("sft",)),
    "reward, steps": Case(
        "from: sft, data: ./steps.jsonl, steps: true, context: 128, epochs: 1, pairs: 8", ("sft",)
    ),
    "rlvr": Case(
        f"from: sft, {ASKED}, reward: [mine.py:score], steps: 2, prompts_per_step: 16, num_generations: 4",
        ("sft",),
    ),
    "rlvr, kl": Case(
        f"from: sft, {ASKED}, reward: [mine.py:score], steps: 2, prompts_per_step: 16, num_generations: 4, "
        "kl: {coefficient: 0.1}, share_prompts: false", ("sft",),
    ),
    "ppo": Case(
        f"from: sft, {ASKED}, reward: [mine.py:score], steps: 4, prompts_per_step: 32, "
        "epochs_per_rollout: 2, sycophancy: 0", ("sft",),
    ),
    "evaluate": Case(
        "from: sft, on: [{task: sums, steps_low: 1, steps_high: 1}], "
        "asking: {limit: 16, max_new_tokens: 16, samples: 3, style: chat}", ("sft",),
    ),
    "compare": Case(
        f"from: sft, against: base, {ASKED}, judge: [mine.py:score], prompt_template: '{{prompt}}'",
        ("sft", "base"),
    ),
    "synthesize": Case(
        "from: sft, data: ./problems.jsonl, form: completion, "
        "steps: [{answer: {max_new_tokens: 16, cut: true}}]",
        ("sft",),
    ),
    "label_steps": Case(
        f"from: sft, {ASKED}, scorer: mine.py:score, labels: exact, num_generations: 4", ("sft",)
    ),
    "merge": Case("of: [base, second], tokens: 1k", ("base", "second")),
    "quantize": Case("from: base, data: corpus, scheme: int8, validation_tokens: 1k", ("base",)),
    "grow": Case("from: base, layers: 4, method: identity", ("base",)),
    "shrink": Case("from: deep, layers: 2, layers_by: influence, data: corpus, tokens: 1k", ("deep",)),
    "anneals": Case(
        "from: base, candidates: {one: corpus}, measure: {./more.jsonl: {validation: 0.3}}, "
        "batch: 1024, epochs: 1",
        ("base",),
    ),
}  # fmt: skip
NO_MODEL = {
    "tokenizer": "data: ./texts.jsonl, vocabulary: 280",
    "corpus": "data: ./texts.jsonl, tokenizer: words",
    "curate": "data: ./texts.jsonl, steps: [{deduplicate: exact}]",
    "forecast": "of: [[third], [second], [base]], take: loss",
    "quality_classifier": "data: ./texts.jsonl, label: ease, held_out: 0.5",
    "text_to_sql": "database: shop.sql, data: ./questions.jsonl, held_out: 0.25",
}
"""Kinds that compute with no model, and so plan, record and compute no FLOPs."""


def test_every_kind_has_a_case():
    named = {name.partition(",")[0] for name in CASES}
    ours = {name for name, kind in kinds().items() if kind.__module__.startswith("trivium.stages.")}
    assert named | NO_MODEL.keys() == ours
    assert not named & NO_MODEL.keys()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("kinds")

    def write(name: str, rows: list[dict]) -> None:
        (place / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    words = ["the", "miller", "of", "the", "town", "counts", "his", "bells", "and", "the", "river", "goes"]
    said = [" ".join(words[n % 5 : n % 5 + 4 + n % 8]) for n in range(300)]
    write("texts.jsonl", [{"text": f"{n} {one}.", "ease": n % 7} for n, one in enumerate(said)])
    write("more.jsonl", [{"text": f"{100 + n}: " + "the miller of the town " * 4} for n in range(100)])
    asks = "what does the miller count now?"
    write("chats.jsonl", [{"prompt": f"{n}: {asks}", "completion": f" {said[n]}"} for n in range(150)])
    pairs = [{"prompt": f"{n}?", "chosen": f" {one}", "rejected": f" no {n}"} for n, one in enumerate(said)]
    write("pairs.jsonl", pairs[:60])
    asked = [{"prompt": f"{100 + n} bells and {200 + n}?", "answer": str(n)} for n in range(64)]
    write("problems.jsonl", asked)
    steps = [
        {"prompt": f"{n}?", "completions": ["a b", "c d e"], "labels": [True, n % 2 == 0]} for n in range(64)
    ]
    write("steps.jsonl", steps)
    (place / "pictures").mkdir()
    pictures = []
    for n in range(40):
        Image.new("RGB", (8, 8), (6 * n, 0, 0)).save(place / "pictures" / f"{n}.png")
        image = {"role": "user", "content": [{"type": "image", "path": f"pictures/{n}.png"}]}
        pictures.append({"messages": [image, {"role": "assistant", "content": said[n]}]})
    write("pictures.jsonl", pictures)
    sounds = []
    for n in range(40):
        with wave.open(str(place / "pictures" / f"{n}.wav"), "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(16_000)
            file.writeframes(bytes([n, 1] * (1600 + 320 * (n % 3))))
        audio = {"role": "user", "content": [{"type": "audio", "path": f"pictures/{n}.wav"}]}
        sounds.append({"messages": [audio, {"role": "assistant", "content": said[n]}]})
    write("sounds.jsonl", sounds)
    goods = "".join(f"INSERT INTO goods (name, price) VALUES ('thing {n}', {n});\n" for n in range(12))
    (place / "shop.sql").write_text(f"CREATE TABLE goods (name TEXT, price INTEGER);\n{goods}")
    sql = "SELECT name FROM goods WHERE price = {}"
    write("questions.jsonl", [{"question": f"What costs {n}?", "sql": sql.format(n)} for n in range(12)])
    (place / "mine.py").write_text(
        "def score(prompts, completions, **columns):\n"
        "    return [float(n % 2) for n in range(len(completions))]\n"
    )
    return place


def spent(folder: Path, case: str, settings: str, needs: tuple[str, ...], numbers: Mapping[str, Any],
          monkeypatch: pytest.MonkeyPatch) -> tuple[float, float, float]:  # fmt: skip
    """The FLOPs of a stage and its parts: planned, recorded, and counted by torch."""
    kind, runs = case.partition(",")[0], folder / "runs"
    recipe = folder / f"{case.replace(', ', '-')}.yaml"
    recipe.write_text(f"name: kinds\nstages:\n{INPUTS}\n  stage: {{kind: {kind}, {settings}}}\n")
    if needs:
        trivium.run(recipe, runs=runs, only=needs)
    monkeypatch.setattr(Tokenizer, "stop_ids", frozenset())
    # The probe is no work of a stage, and what it finds, numbers of rows, is this machine's.
    monkeypatch.setattr(exactness, "probed", lambda products, heads: exactness.Exactness())
    plan = planned(recipe, runs, only=["stage"])
    assert plan.prepared is not None
    mine = [name for name in plan.numbers if name.partition("+")[0] == "stage"]
    expected = 0.0
    for name in mine:
        # No answer ends by itself, and all groups teach.
        known = {"answer tokens": 1e6, "teaching": 1.0, **numbers}
        derived = {**plan.numbers, name: {**plan.numbers[name], **known}}
        expected += job_of(plan.prepared, name, derived, Checked()).flops().total
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        seen = trivium.run(recipe, runs=runs, only=["stage"])
    records = [yaml.safe_load((seen[name].folder / "stage.yaml").read_text()) for name in mine]
    return expected, sum(one["flops"] or 0.0 for one in records), counter.get_total_flops()


@pytest.mark.quick_cases(2)
@pytest.mark.parametrize(
    "case", [pytest.param(one, marks=pytest.mark.slow) if "," in one else one for one in CASES]
)
def test_the_flops_of_a_kind_are_those_torch_counts(folder, case, monkeypatch):
    one = CASES[case]
    expected, recorded, counted = spent(folder, case, one.settings, one.needs, one.numbers, monkeypatch)
    assert counted > 0
    assert recorded == pytest.approx(counted, rel=one.recorded)
    assert expected == pytest.approx(counted, rel=one.within)


@pytest.mark.quick_cases(2)
@pytest.mark.parametrize("kind", NO_MODEL)
def test_a_kind_without_a_model_computes_nothing(folder, kind, monkeypatch):
    needs = tuple(name for name in ("words", "base", "second", "third") if name in NO_MODEL[kind])
    assert spent(folder, kind, NO_MODEL[kind], needs, {}, monkeypatch) == (0.0, 0.0, 0.0)
