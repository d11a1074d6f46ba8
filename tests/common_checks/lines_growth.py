"""Settings of growth: of the stage, and of the points in a training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lines import moves, refuses
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
