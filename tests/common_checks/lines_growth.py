"""Settings of growth: of the stage, and of the points in a training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lines import LINES, TRAINS, Line, moves, refuses
from tiny_run import Seen
from torch import Tensor

from trivium.kit.files import load_tensors
from trivium.model.folder import load_model
from trivium.model.growth import largest_difference, probe


def parent(seen: Seen) -> Path:
    stage: Any = seen.stage
    return seen.inputs[stage.start]


def distance(seen: Seen) -> float:
    """How far the logits lie from the parent's."""
    models = [load_model(place) for place in (parent(seen), seen.folder / "model")]
    return largest_difference(models[0], models[1], probe(200, 32))


def layer(seen: Seen, number: int) -> dict[str, Tensor]:
    prefix = f"model.layers.{number}."
    return {name.removeprefix(prefix): one for name, one in seen.weights.items() if name.startswith(prefix)}


def is_layer(seen: Seen, number: int, old: int) -> bool:
    """Whether a layer is one of the parent's, bit for bit."""
    stored = load_tensors(parent(seen) / "model.safetensors")
    return all(
        torch.equal(one, stored[f"model.layers.{old}.{name}"]) for name, one in layer(seen, number).items()
    )


SIX = {"from": "deep", "layers": 6}
"""The six layers that four become."""


@moves("from", "second", kinds=["grow"])
def grown_from(before: Seen, after: Seen) -> None:
    assert is_layer(before, 0, 0)
    assert is_layer(after, 0, 0)


@moves("layers", 3, kinds=["grow"])
def more_layers(before: Seen, after: Seen) -> None:
    assert [seen.config["num_hidden_layers"] for seen in (before, after)] == [2, 3]
    assert distance(after) < 1e-4


@moves(
    "method", "stack", "interpolate", "overlap", "random", kinds=["grow"], both={"from": "deep", "layers": 6}
)
def other_methods(before: Seen, after: Seen, value: str) -> None:
    assert distance(before) < 1e-4
    assert distance(after) > 1e-4
    olds = {"stack": [0, 1, 2, 3, 0, 1], "interpolate": [0, None, None, None, None, 3],
            "overlap": [0, 1, 2, 1, 2, 3], "random": [0, 1, None, 2, 3, None]}[value]  # fmt: skip
    for number, old in enumerate(olds):
        assert old is None or is_layer(after, number, old)


for method in ("masked", "learned"):
    refuses("method", method, "takes steps of training", kinds=["grow"])


@moves("method", "identity", kinds=["grow"], both={"method": "random"})
def identity(before: Seen, after: Seen) -> None:
    assert distance(before) > 1e-4
    assert distance(after) < 1e-4


@moves("place", "between", "end", kinds=["grow"], both=SIX)
@moves("place", "interleaved", kinds=["grow"], both={**SIX, "place": "end"})
def where(before: Seen, after: Seen, value: str) -> None:
    olds = {"between": [0, 1, None, None, 2, 3], "end": [0, 1, 2, 3, None, None],
            "interleaved": [0, 1, None, 2, 3, None]}[value]  # fmt: skip
    assert [after.summary["new_layers"]] == [[number for number, old in enumerate(olds) if old is None]]
    for number, old in enumerate(olds):
        assert old is None or is_layer(after, number, old)


@moves("width", 64, kinds=["grow"])
def wider(before: Seen, after: Seen) -> None:
    assert [seen.config["hidden_size"] for seen in (before, after)] == [32, 64]
    assert [seen.config["num_attention_heads"] for seen in (before, after)] == [2, 4]
    assert distance(after) < 1e-4


@moves("heads", 6, kinds=["grow"])
@moves("key_value_heads", 6, kinds=["grow"])
def more_heads(before: Seen, after: Seen) -> None:
    assert [seen.config["num_attention_heads"] for seen in (before, after)] == [2, 6]
    assert [seen.config["num_key_value_heads"] for seen in (before, after)] == [2, 6]
    assert distance(after) < 1e-4


@moves("inner_width", 50, kinds=["grow"])
def wider_inside(before: Seen, after: Seen) -> None:
    assert [seen.config["intermediate_size"] for seen in (before, after)] == [32, 50]
    assert distance(after) < 1e-4


@moves("width_method", "pad", kinds=["grow"], both={"width": 64})
@moves("width_method", "tile", kinds=["grow"], both={"width": 80})
def how_it_widens(before: Seen, after: Seen, value: str) -> None:
    padded, tiled = (after, before) if value == "pad" else (before, after)
    tables = [seen.weights["model.embed_tokens.weight"] for seen in (padded, tiled)]
    assert not tables[0][:, 32:].any()
    torch.testing.assert_close(tables[1][:, 32:64], tables[1][:, :32])


@moves("noise", 0.0, kinds=["grow"], both={"width": 64})
def copies_differ(before: Seen, after: Seen) -> None:
    gates = [seen.weights["model.layers.0.mlp.gate_proj.weight"] for seen in (before, after)]
    assert not torch.allclose(gates[0][:, :32], gates[0][:, 32:])
    torch.testing.assert_close(gates[1][:, :32], gates[1][:, 32:])


@moves("experts", {"count": 3}, kinds=["grow"])
@moves("experts.count", 3, kinds=["grow"], both={"experts": {"count": 2}})
def experts(before: Seen, after: Seen) -> None:
    assert after.config["num_experts"] == 3
    assert distance(after) < 1e-4


@moves("experts.per_token", 1, kinds=["grow"], both={"experts": {"count": 3}})
def experts_of_a_token(before: Seen, after: Seen) -> None:
    assert [seen.config["num_experts_per_tok"] for seen in (before, after)] == [2, 1]


@moves("experts.noise", 0.5, kinds=["grow"], both={"experts": {"count": 3}})
def experts_differ(before: Seen, after: Seen) -> None:
    def same(seen: Seen) -> bool:
        names = [f"model.layers.0.mlp.experts.{one}.up_proj.weight" for one in (0, 1)]
        return torch.equal(seen.weights[names[0]], seen.weights[names[1]])

    assert same(before)
    assert not same(after)
    assert distance(after) > 1e-4


# Logits of some ten thousand: rounding alone moves them.
LOUD = {"from": "loud", "width": 64, "exact": False}
refuses("exact", True, "moved the logits", kinds=["grow"], both=LOUD)


def grown_state(seen: Seen) -> bool:
    return (seen.folder / "moments.safetensors").is_file()


@moves("optimiser_state", "reset", kinds=["grow"])
def state_is_reset(before: Seen, after: Seen) -> None:
    assert grown_state(before)
    assert not grown_state(after)
    assert after.changes["optimiser state"][1] == "reset"


@moves("seed", 2, kinds=["grow"], both={"width": 64})
def other_noise(before: Seen, after: Seen) -> None:
    gates = [seen.weights["model.layers.0.mlp.gate_proj.weight"] for seen in (before, after)]
    assert not torch.equal(*gates)


# growth while a stage trains

GROWS = ("pretrain", "midtrain")
POINT: dict[str, Any] = {"at": 0.5, "layers": 2}


@moves("grow", [POINT], kinds=GROWS, both={"steps": 4})
def grows(before: Seen, after: Seen) -> None:
    assert [seen.config["num_hidden_layers"] for seen in (before, after)] == [1, 2]
    # The function is kept: the step after the growth has the loss it would have had.
    losses = [seen.column("loss") for seen in (before, after)]
    assert losses[1][:2] == losses[0][:2]
    assert abs(losses[1][2] - losses[0][2]) < 1e-4
    assert losses[1][3] != losses[0][3]


def has(key: str, value: int) -> Any:
    return lambda before, after: _is(before, after, key, value)


def _is(before: Seen, after: Seen, key: str, value: int) -> None:
    assert before.config.get(key) != value
    assert after.config[key] == value


def other_weights(before: Seen, after: Seen) -> None:
    assert before.weights.keys() == after.weights.keys()
    assert any(not torch.equal(one, after.weights[name]) for name, one in before.weights.items())


def warmed(before: Seen, after: Seen) -> None:
    assert after.rates[:2] == before.rates[:2]
    assert after.rates[2] == before.rates[2] / 2


def frozen(before: Seen, after: Seen) -> None:
    assert {name.split(".")[0] for name in before.trainers[0].named} > {"layers"}
    assert {name.rsplit(".")[1] for name in after.trainers[0].named} == {"1"}


def earlier(before: Seen, after: Seen) -> None:
    names = [[one for one in seen.changes if one.startswith("parameters after")] for seen in (before, after)]
    assert names == [["parameters after step 2"], ["parameters after step 1"]]


MASKED = {"at": "step=1", "layers": 2, "method": "masked", "steps": 1}
WIDE, MIXED = {"at": 0.5, "width": 64}, {"at": 0.5, "experts": {"count": 2}}
POINTS: list[tuple[str, Any, dict[str, Any], dict[str, Any], Any]] = [
    ("layers", 3, POINT, {"at": 0.5, "layers": 3}, has("num_hidden_layers", 3)),
    ("method", "random", POINT, {**POINT, "method": "random"}, other_weights),
    ("width", 64, POINT, WIDE, has("hidden_size", 64)),
    ("heads", 6, POINT, {"at": 0.5, "heads": 6}, has("num_attention_heads", 6)),
    ("key_value_heads", 6, POINT, {"at": 0.5, "key_value_heads": 6}, has("num_key_value_heads", 6)),
    ("inner_width", 50, POINT, {"at": 0.5, "inner_width": 50}, has("intermediate_size", 50)),
    ("width_method", "pad", WIDE, {**WIDE, "width_method": "pad"}, other_weights),
    ("noise", 0.0, WIDE, {**WIDE, "noise": 0.0}, other_weights),
    ("experts", {"count": 2}, POINT, MIXED, has("num_experts", 2)),
    ("experts.count", 3, MIXED, {"at": 0.5, "experts": {"count": 3}}, has("num_experts", 3)),
    ("experts.per_token", 1, MIXED, {"at": 0.5, "experts": {"count": 2, "per_token": 1}},
     has("num_experts_per_tok", 1)),
    ("experts.noise", 0.5, MIXED, {"at": 0.5, "experts": {"count": 2, "noise": 0.5}}, other_weights),
    ("at", "25%", POINT, {**POINT, "at": "25%"}, earlier),
    ("warmup", 1, POINT, {**POINT, "warmup": 1}, warmed),
    ("optimiser_state", "reset", POINT, {**POINT, "optimiser_state": "reset"}, other_weights),
    ("freeze", True, POINT, {**POINT, "freeze": True}, frozen),
    ("method", "masked", POINT, {**MASKED, "at": 0.5}, other_weights),
    ("method", "learned", POINT, {**MASKED, "at": 0.5, "method": "learned"}, other_weights),
    ("steps", 2, MASKED, {**MASKED, "steps": 2}, other_weights),
]  # fmt: skip
for name, value, before, after, check in POINTS:
    for kind in GROWS:
        both = {"steps": 4, "learning_rate.decay": "constant"}
        LINES.append(
            Line(kind, f"grow.{name}", value, {**both, "grow": [after]}, {**both, "grow": [before]}, check)
        )

FIRST = {"at": "step=1", "layers": 2}
SECOND = {"at": "step=2", "layers": 4}
for kind in GROWS:
    LINES.append(
        Line(
            kind, "grow.place", "end", {"grow": [FIRST, {**SECOND, "place": "end"}]},
            {"steps": 3, "grow": [FIRST, SECOND]}, other_weights,
        )
    )  # fmt: skip


@moves("train_only", ["layers.0.mlp"], kinds=TRAINS)
def only_parts(before: Seen, after: Seen) -> None:
    parts = {name.rpartition(".")[0] for name in after.trainers[0].named if not name.startswith("extra.")}
    assert parts == {f"layers.0.mlp.{one}" for one in ("gate", "up", "down")}
    assert len(before.trainers[0].named) > len(after.trainers[0].named)


# shrink


def kept(seen: Seen) -> list[int]:
    found = [old for number in range(seen.config["num_hidden_layers"]) for old in range(4)
             if is_layer(seen, number, old)]  # fmt: skip
    assert found == seen.summary["kept_layers"]
    return found


@moves("from", "wide", kinds=["shrink"], both={"layers": 1})
def shrunk_from(before: Seen, after: Seen) -> None:
    assert len(kept(before)) == 1
    assert after.summary["kept_layers"] == [0]
    assert is_layer(after, 0, 0)


@moves("layers", 3, kinds=["shrink"])
def fewer_layers(before: Seen, after: Seen) -> None:
    assert [len(kept(seen)) for seen in (before, after)] == [2, 3]


HELD_OUT = {"texts.jsonl": {"validation": 0.3}}
EVEN = {"from": "deep", "layers": 2, "data": None, "layers_by": "even"}


@moves("layers_by", "even", kinds=["shrink"], beside={"data": None})
def evenly(before: Seen, after: Seen) -> None:
    assert kept(after) == [0, 3]
    assert before.summary["measured_tokens"] > after.summary["measured_tokens"] == 0


@moves("layers_by", "influence", kinds=["shrink"], both=EVEN, beside={"data": HELD_OUT})
def by_influence(before: Seen, after: Seen) -> None:
    assert kept(before) == [0, 3]
    assert after.summary["measured_tokens"] > 0


@moves("width", 24, kinds=["shrink"])
@moves("key_value_heads", 1, kinds=["shrink"])
@moves("inner_width", 20, kinds=["shrink"])
def narrower(before: Seen, after: Seen, value: int) -> None:
    key = {24: "hidden_size", 1: "num_key_value_heads", 20: "intermediate_size"}[value]
    assert before.config[key] > after.config[key] == value


@moves("context", 16, kinds=["shrink"])
def in_shorter_rows(before: Seen, after: Seen) -> None:
    assert before.summary["measured_sequences"] < after.summary["measured_sequences"]


@moves("tokens", 20, kinds=["shrink"])
def on_fewer_tokens(before: Seen, after: Seen) -> None:
    assert before.summary["measured_tokens"] > after.summary["measured_tokens"]


@moves("seed", 2, kinds=["shrink"])
def no_seed(before: Seen, after: Seen) -> None:
    assert kept(before) == kept(after)
