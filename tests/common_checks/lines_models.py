"""Settings of the stages that make and change models by documents, or by their weights alone."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from lines import ANSWERS, INHERITS, moves, refuses
from tiny_run import OTHERS, Seen, equal
from torch import Tensor

from trivium.data.mixture import weight_at
from trivium.kit.files import load_tensors
from trivium.model.quantize import multiplies_exactly
from trivium.model.vocabulary import old_pieces
from trivium.tokens.tokenizer import Tokenizer

# pretrain


@moves("model.family", "llama", "gpt2", "qwen3", kinds=["pretrain"], both={"model.family": "llama"})
def family(before: Seen, after: Seen, value: str) -> None:
    assert after.config["model_type"] == value


SHAPES = {
    "depth": (2, "num_hidden_layers"), "layers": (3, "num_hidden_layers"), "width": (64, "hidden_size"),
    "heads": (4, "num_attention_heads"), "key_value_heads": (1, "num_key_value_heads"),
    "head_width": (8, "head_dim"), "inner_width": (48, "intermediate_size"),
    "tied": (True, "tie_word_embeddings"),
}  # fmt: skip


def shape_is(key: str) -> Any:
    def check(before: Seen, after: Seen, value: Any) -> None:
        assert before.config[key] != value
        assert after.config[key] == value

    return check


for name, (value, key) in SHAPES.items():
    moves(f"model.{name}", value, kinds=["pretrain"], both={"model.key_value_heads": 2})(shape_is(key))


@moves("model.rope_theta", 500.0, kinds=["pretrain"])
def rope_theta(before: Seen, after: Seen) -> None:
    assert before.config["rope_parameters"]["rope_theta"] == 10000.0
    assert after.config["rope_parameters"]["rope_theta"] == 500.0


def longest(seen: Seen) -> int:
    return max(len(row) for rows in seen.batches for row in rows)


@moves("context", 48, kinds=["multimodal"])
@moves("context", 32, kinds=["pretrain", "sft", "distill"])
def context(before: Seen, after: Seen) -> None:
    assert after.stage.context < longest(before) <= 64  # type: ignore[attr-defined]
    assert longest(after) <= after.stage.context  # type: ignore[attr-defined]


@moves("tokenizer", "bigger", kinds=["pretrain"], both={"data": "texts.jsonl", "tokenizer": "words"})
def tokenizer(before: Seen, after: Seen) -> None:
    for seen, name in ((before, "words"), (after, "bigger")):
        assert seen.config["vocab_size"] == Tokenizer.load(seen.inputs[name]).vocabulary_size
    assert before.config["vocab_size"] != after.config["vocab_size"]


# midtrain


@moves("from", "second", kinds=INHERITS)
def start(before: Seen, after: Seen) -> None:
    assert after.begun.keys() == before.begun.keys()
    theirs = load_tensors(after.inputs["second"] / "model.safetensors")
    weights = after.begun["embedding.weight"]
    assert torch.equal(weights, theirs["model.embed_tokens.weight"])
    assert not torch.equal(weights, before.begun["embedding.weight"])


MEASURED = {"texts.jsonl": {"validation": 0.5}}
FADING = {"corpus": {"weight": [1, 0]}, "others": {"weight": [0, 1]}}


@moves("ramp", "cosine", kinds=["midtrain"], both={"data": FADING})
@moves("ramp", "cosine", kinds=["anneals"], both={"candidates": {"one": FADING}, "measure": MEASURED})
def ramp(before: Seen, after: Seen) -> None:
    for seen, expected in ((before, 0.75), (after, (1 + math.cos(math.pi / 4)) / 2)):
        weights = seen.trainer.batches.plan.sources[0].weights  # type: ignore[attr-defined]
        assert weight_at(weights, 0.25, after=True) == pytest.approx(expected)


@moves("ramp", "linear", kinds=["midtrain"], both={"data": FADING, "ramp": "cosine"})
def straight_ramp(before: Seen, after: Seen) -> None:
    assert len(after.trainer.batches.plan.sources[0].weights) == 2  # type: ignore[attr-defined]


def share(seen: Seen, name: str) -> float:
    return seen.trainer.batches.report()[name]["share"]  # type: ignore[attr-defined]


@moves("replay.share", 0.25, kinds=["midtrain"], both={"data": "others", "replay.share": 0.5})
@moves("replay.share", 0.25, kinds=["anneals"], both={"candidates": {"one": "others"}, "replay.share": 0.5})
def replay(before: Seen, after: Seen) -> None:
    """Of four rows, what the parent learnt from has two, and then one."""
    assert share(before, "corpus") == 0.5
    assert share(after, "corpus") == 0.25


@moves("replay.share", 0.25, kinds=ANSWERS, both={"replay.share": 0.5})
def replay_beside_answers(before: Seen, after: Seen) -> None:
    assert share(before, "corpus") == 0.5
    assert share(after, "corpus") == 0.25


ADDED = {"vocabulary": {"data": "others.jsonl", "added": 6}}


def new_tokens(seen: Seen) -> list[str]:
    made = Tokenizer.load(seen.place / "model")
    known = Tokenizer.load(seen.inputs["base"]).vocabulary_size
    return [made.decode([number]) for number in range(known, made.vocabulary_size)]


@moves("vocabulary.added", 3, kinds=["midtrain"], both=ADDED)
def added(before: Seen, after: Seen) -> None:
    known = Tokenizer.load(after.inputs["base"]).vocabulary_size
    assert before.changes["vocabulary"] == (known, known + 6)
    assert after.changes["vocabulary"] == (known, known + 3)
    assert after.config["vocab_size"] == after.weights["model.embed_tokens.weight"].shape[0] == known + 3


def rows_of_new_tokens(seen: Seen) -> tuple[Tensor, dict[int, list[int]]]:
    pieces = old_pieces(Tokenizer.load(seen.inputs["base"]), Tokenizer.load(seen.place / "model"))
    return seen.begun["embedding.weight"], pieces


@moves("vocabulary.start", "random", kinds=["midtrain"], both=ADDED)
def start_at_random(before: Seen, after: Seen) -> None:
    table, pieces = rows_of_new_tokens(before)
    others, _ = rows_of_new_tokens(after)
    assert len(pieces) == 6
    for number, parts in pieces.items():
        torch.testing.assert_close(table[number], table[parts].mean(0))
        assert not torch.allclose(others[number], table[number], atol=1e-3)


@moves(
    "vocabulary.start",
    "mean",
    kinds=["midtrain"],
    both={"vocabulary": {**ADDED["vocabulary"], "start": "random"}},
)
def start_at_the_mean(before: Seen, after: Seen) -> None:
    table, pieces = rows_of_new_tokens(after)
    assert all(torch.allclose(table[number], table[parts].mean(0)) for number, parts in pieces.items())


def text_of(tokens: list[str]) -> str:
    return "".join(tokens)


@moves(
    "vocabulary.characters", 45, kinds=["midtrain"], both={"vocabulary": {**ADDED["vocabulary"], "added": 20}}
)
def characters(before: Seen, after: Seen) -> None:
    """Two texts are read and no others, so only what stands in them becomes a token."""
    assert new_tokens(after) != new_tokens(before)
    assert all(any(token in text for text in OTHERS[:4]) for token in new_tokens(after))


def reading_new_tokens(name: str, value: Any, before: Any, after: Any, check: Any, **more: Any) -> None:
    """How the texts are read from which tokens are learnt."""

    def naming(source: Any) -> dict[str, Any]:
        return {"vocabulary": {"data": [source], "added": 20, "characters": 200}}

    moves(f"vocabulary.data.{name}", value, kinds=["midtrain"], both=naming(before),
          beside=naming(after), moved=False, **more)(check)  # fmt: skip


def other_tokens(before: Seen, after: Seen) -> None:
    assert new_tokens(after) != new_tokens(before)


def made_of_zz(before: Seen, after: Seen) -> None:
    assert not any("zz" in token for token in new_tokens(before))
    assert any("zz" in token for token in new_tokens(after))


OTHER = {"path": "others.jsonl"}
reading_new_tokens("path", "texts.jsonl", OTHER, {"path": "texts.jsonl"}, other_tokens)
reading_new_tokens("limit", 2, OTHER, {**OTHER, "limit": 2}, other_tokens)
reading_new_tokens("columns", {"text": "other"}, OTHER, {**OTHER, "columns": {"text": "other"}}, made_of_zz)
HALVES, NOTES = {"path": "halves-others"}, {"path": "notes.txt", "separator": "\n\n"}
reading_new_tokens("split", "train", HALVES, {**HALVES, "split": "train"}, other_tokens)
reading_new_tokens("separator", "|", NOTES, {**NOTES, "separator": "|"}, other_tokens)
reading_new_tokens(
    "subset", "en", OTHER, {**OTHER, "subset": "en"}, None, refused="names a part of a data set on the hub"
)
DAMAGED = {"path": "damaged-others.jsonl", "on_bad": "skip"}
WHOLE = {"characters": 10**6}
moves("vocabulary.data.on_bad", "skip", kinds=["midtrain"], both={"vocabulary": {**ADDED["vocabulary"]}},
      beside={"vocabulary.data": [DAMAGED]}, moved=False)(lambda before, after: None)  # fmt: skip
refuses("vocabulary.data.on_bad", "stop", "damaged-others.jsonl:", kinds=["midtrain"],
        both={"vocabulary": {"data": [DAMAGED], "added": 6}},
        beside={"vocabulary.data": [{"path": "damaged-others.jsonl"}]}, moved=False)  # fmt: skip


def lengths(seen: Seen) -> list[int]:
    return [max(len(row) for row in rows) for rows in seen.batches]


@moves("context.length", 32, kinds=["midtrain"])
def shorter_rows(before: Seen, after: Seen) -> None:
    assert max(lengths(before)) > 32 >= max(lengths(after))


@moves("context.length", [16, 64], kinds=["midtrain"])
def growing_rows(before: Seen, after: Seen) -> None:
    first, last = lengths(after)
    assert first <= 16 < last <= 64


LONGER = {"context": {"length": 128, "method": "yarn"}}
TYPES = {
    "interpolate": "linear",
    "dynamic": "dynamic",
    "yarn": "yarn",
    "longrope": "longrope",
    "llama3": "llama3",
}


@moves("context.method", *TYPES, kinds=["midtrain"], both={"context": {"length": 128, "method": "ntk"}})
def method(before: Seen, after: Seen, value: str) -> None:
    assert before.config["rope_parameters"]["rope_type"] == "default"
    rope = after.config["rope_parameters"]
    assert rope["rope_type"] == TYPES[value]
    assert rope["factor"] == 2.0


@moves("context.method", "ntk", "extrapolate", kinds=["midtrain"], both=LONGER)
def another_base(before: Seen, after: Seen, value: str) -> None:
    """NTK-aware scaling raises the base by factor^(d / (d - 2)); extrapolation leaves it."""
    expected = 10000 * 2 ** (16 / 14) if value == "ntk" else 10000
    assert after.config["rope_parameters"]["rope_theta"] == pytest.approx(expected, rel=1e-3)
    assert after.config["max_position_embeddings"] == 128


@moves("context.method", "base", kinds=["midtrain"], both=LONGER, beside={"context.base": 50_000.0})
@moves("context.base", 50_000.0, kinds=["midtrain"], both=LONGER)
def base_frequency(before: Seen, after: Seen) -> None:
    assert after.config["rope_parameters"]["rope_theta"] == 50_000.0


@moves(
    "context.method",
    "nope",
    kinds=["midtrain"],
    both={"from": "llama", "context": {"length": 128, "method": "yarn"}},
)
def no_positions(before: Seen, after: Seen) -> None:
    assert after.config["no_rope_layers"] == [0]


@moves(
    "context.every",
    2,
    kinds=["midtrain"],
    both={"from": "llama", "context": {"length": 128, "method": "nope"}},
)
def every_other_layer(before: Seen, after: Seen) -> None:
    """Of one layer alone, none is the second."""
    assert before.config["no_rope_layers"] == [0]
    assert after.config.get("no_rope_layers", [1]) == [1]


def in_rope(name: str, value: Any, method: str, **beside: Any) -> None:
    def check(before: Seen, after: Seen) -> None:
        assert before.config["rope_parameters"][name] != value
        assert after.config["rope_parameters"][name] == value

    moves(f"context.{name}", value, kinds=["midtrain"],
          both={"context": {"length": 128, "method": method, **beside}})(check)  # fmt: skip


in_rope("factor", 4.0, "yarn")
in_rope("beta_fast", 16.0, "yarn")
in_rope("beta_slow", 1.5, "yarn")
in_rope("low_freq_factor", 2.0, "llama3")
in_rope("high_freq_factor", 8.0, "llama3")
in_rope("short_factor", [1.5] * 8, "longrope")
in_rope("long_factor", [3.0] * 8, "longrope")

# anneals


@moves("candidates", {"one": "corpus", "two": "others"}, kinds=["anneals"], both={"measure": MEASURED})
def candidates(before: Seen, after: Seen) -> None:
    assert [row["candidate"] for row in before.summary["candidates"]] == ["one"]
    assert {row["candidate"] for row in after.summary["candidates"]} == {"one", "two"}


# merge

OF = ("base", "forked")


def ingredients(seen: Seen) -> list[dict[str, Tensor]]:
    stage: Any = seen.stage
    return [load_tensors(seen.inputs[name] / "model.safetensors") for name in stage.of]


def is_mixed(seen: Seen, shares: list[float]) -> None:
    parts = ingredients(seen)
    for name, found in seen.weights.items():
        expected = sum(share * part[name].double() for share, part in zip(shares, parts, strict=True))
        torch.testing.assert_close(found, expected.float(), msg=name)  # type: ignore[union-attr]


@moves("of", ["base", "second"], kinds=["merge"])
def of(before: Seen, after: Seen) -> None:
    is_mixed(before, [0.5, 0.5])
    is_mixed(after, [0.5, 0.5])


@moves("weights", [0.75, 0.25], kinds=["merge"])
def weights(before: Seen, after: Seen) -> None:
    is_mixed(after, [0.75, 0.25])


@moves("decay", 0.75, kinds=["merge"], both={"method": "ema"})
@moves("method", "ema", kinds=["merge"], beside={"decay": 0.75})
def decay(before: Seen, after: Seen) -> None:
    is_mixed(after, [0.75, 0.25])


@moves("share", 0.25, kinds=["merge"], both={"method": "slerp"})
@moves("method", "slerp", kinds=["merge"], both={"of": ["base", "second"]}, beside={"share": 0.25})
def slerp(before: Seen, after: Seen) -> None:
    """A quarter of the way along the great circle."""
    first, second = (one["lm_head.weight"].double() for one in ingredients(after))
    angle = math.acos(float((first * second).sum() / (first.norm() * second.norm())))
    expected = (math.sin(0.75 * angle) * first + math.sin(0.25 * angle) * second) / math.sin(angle)
    torch.testing.assert_close(after.weights["lm_head.weight"], expected.float())
    assert not torch.allclose(before.weights["lm_head.weight"], expected.float(), atol=1e-5)


FROM_BASE = {"of": ["forked", "second"], "base": "base", "method": "tasks"}


@moves("method", "tasks", kinds=["merge"], both={"of": FROM_BASE["of"]}, beside={"base": "base"})
@moves("scale", 0.5, kinds=["merge"], both=FROM_BASE)
@moves(
    "base", "second", kinds=["merge"], both={"of": ["forked", "base"], "base": "forked", "method": "tasks"}
)
def tasks(before: Seen, after: Seen) -> None:
    stage: Any = after.stage
    root = load_tensors(after.inputs[stage.base] / "model.safetensors")
    for name, found in after.weights.items():
        expected = root[name] + stage.scale * sum(one[name] - root[name] for one in ingredients(after))
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@moves("method", "ties", "dare", kinds=["merge"], both=FROM_BASE)
@moves("density", 0.1, kinds=["merge"], both={**FROM_BASE, "method": "ties"})
@moves("density", 0.1, kinds=["merge"], both={**FROM_BASE, "method": "dare"})
def thinned(before: Seen, after: Seen) -> None:
    """Fewer of the base's weights move."""
    root = load_tensors(after.inputs["base"] / "model.safetensors")

    def still(seen: Seen) -> int:
        return sum(
            int(torch.isclose(root[name], one, rtol=0, atol=1e-8).sum()) for name, one in seen.weights.items()
        )

    assert still(after) > still(before)


@moves("method", "mean", kinds=["merge"], both={"method": "slerp"})
def mean(before: Seen, after: Seen) -> None:
    is_mixed(after, [0.5, 0.5])


@moves("method", "greedy", kinds=["merge"])
def greedy(before: Seen, after: Seen) -> None:
    """What does not help is left out, and the rest averaged."""
    kept = after.summary["of"]
    is_mixed(after, [float(name in kept) / len(kept) for name in OF])


@moves("seed", 2, kinds=["merge"], both={**FROM_BASE, "method": "dare"})
def seed_of_a_soup(before: Seen, after: Seen) -> None:
    assert not equal(before.weights, after.weights)


@moves("tokens", 20, kinds=["merge"])
@moves("context", 16, kinds=["merge"])
def measured_on_less(before: Seen, after: Seen) -> None:
    assert equal(before.weights, after.weights)
    assert before.summary["bits_per_byte"] != after.summary["bits_per_byte"]


# quantize


@moves("from", "second", kinds=["quantize"])
def rounded_model(before: Seen, after: Seen) -> None:
    name = "model.embed_tokens.weight"
    theirs = load_tensors(after.inputs["second"] / "model.safetensors")
    assert torch.equal(after.weights[name], theirs[name])
    assert not torch.equal(before.weights[name], theirs[name])


EXACT = ["int8-dynamic"] if multiplies_exactly() else []


@moves("scheme", "int4", *EXACT, "int8", kinds=["quantize"], both={"scheme": "int4", "seed": 1})
def scheme(before: Seen, after: Seen, value: str) -> None:
    assert after.summary["scheme"] == value
    smaller = after.summary["matrices_bytes_after"] / after.summary["matrices_bytes_before"]
    assert (smaller < 0.25) == (value == "int4")
    inputs = after.config["quantization_config"]["config_groups"]["group_0"].get("input_activations")
    assert (inputs is not None) == (value == "int8-dynamic")


@moves("context", 4, kinds=["quantize"])
def shorter_pieces(before: Seen, after: Seen) -> None:
    assert after.summary["bits_per_byte_before"] != before.summary["bits_per_byte_before"]


@moves("validation_tokens", 20, kinds=["quantize"])
def fewer_tokens(before: Seen, after: Seen) -> None:
    assert after.summary["tokens"] < before.summary["tokens"]


@moves("seed", 2, kinds=["quantize", "tokenizer", "corpus"])
def nothing_is_drawn(before: Seen, after: Seen) -> None:
    """These stages draw nothing, so their fingerprints do not count the seed, and the product is the same."""
    assert before.stage.counted() == after.stage.counted()
