"""Settings of adapters and of rounding while training, in every stage that starts from a model."""

from __future__ import annotations

import math

import torch
from lines import INHERITS, moves, refuses
from tiny_run import Seen, first_loss
from torch import Tensor

from trivium.model.lora import AdaptedLinear, adapted_layers, whole
from trivium.model.quantize import quantised_as

SMALL = {"adapter": {"rank": 2, "save": "merged"}, "learning_rate.from": 0.01}
BOTH = {"adapter": {"rank": 2}, "learning_rate.from": 0.01}
KEEPS = tuple(kind for kind in INHERITS if kind != "reward")
"""Kinds that can leave the adapter apart; a reward model is saved whole."""


def layers(seen: Seen) -> dict[str, AdaptedLinear]:
    return adapted_layers(seen.trainer.model)


def product(layer: AdaptedLinear) -> Tensor:
    """What the adapter adds, by its formula."""
    shape = layer.shapes["default"]
    return shape.scale * layer.up["default"] @ layer.down["default"]


@moves(
    "adapter.rank", 3, kinds=INHERITS, both={"learning_rate.from": 0.01}, beside={"adapter.save": "merged"}
)
def rank(before: Seen, after: Seen) -> None:
    """Without an adapter all is trained; with one, only its matrices, of this rank, beside frozen weights."""
    assert not layers(before)
    assert layers(after)
    for layer in layers(after).values():
        assert layer.down["default"].shape[0] == layer.up["default"].shape[1] == 3
        assert layer.up["default"].abs().max() > 0
    assert all(
        ".down." in name or ".up." in name or name.startswith(("extra.", "modalities."))
        for name in after.begun
    )


@moves("adapter.alpha", 6.0, kinds=INHERITS, both=SMALL)
def alpha(before: Seen, after: Seen) -> None:
    assert {layer.shapes["default"].scale for layer in layers(before).values()} == {32 / 2}
    for layer in layers(after).values():
        assert layer.shapes["default"].scale == 6 / 2
        torch.testing.assert_close(layer.merged("default"), layer.weight + product(layer))


@moves("adapter.kind", "rslora", kinds=INHERITS, both=SMALL)
def rslora(before: Seen, after: Seen) -> None:
    assert {layer.shapes["default"].scale for layer in layers(after).values()} == {32 / math.sqrt(2)}


@moves("adapter.kind", "dora", kinds=["sft"], both=SMALL)
def dora(before: Seen, after: Seen) -> None:
    """Each output's weights have the learned length in the direction that weight and product have."""
    for layer in layers(after).values():
        turned = layer.weight + product(layer)
        wanted = turned * (layer.magnitude["default"] / turned.norm(dim=1))[:, None]
        torch.testing.assert_close(layer.merged("default"), wanted.detach())


@moves("adapter.kind", "pissa", kinds=["sft"], both=SMALL)
def pissa(before: Seen, after: Seen) -> None:
    """The adapter begins as the strongest directions, taken out of the weight: no output is another."""
    assert abs(first_loss(after) - first_loss(before)) < 1e-5
    for name, layer in layers(after).items():
        down, up = layer.taken["default"]
        original = layers(before)[name].weight
        strongest = torch.linalg.svdvals(original)[:2]
        torch.testing.assert_close(
            torch.linalg.svdvals(32 / 2 * up @ down)[:2], strongest, rtol=1e-4, atol=1e-5
        )


@moves("adapter.kind", "lora", kinds=["sft"], both={"adapter": {"rank": 2, "kind": "dora"}})
def lora(before: Seen, after: Seen) -> None:
    assert any(layer.magnitude for layer in layers(before).values())
    assert not any(layer.magnitude for layer in layers(after).values())


@moves("adapter.targets", ["query", "mlp.*"], kinds=INHERITS, both=SMALL)
def targets(before: Seen, after: Seen) -> None:
    named = set(layers(after))
    assert named < set(layers(before))
    assert named == {name for name in layers(before) if name.endswith(".query") or ".mlp." in name}


@moves("adapter.ranks", {"query": 1}, kinds=INHERITS, both=SMALL)
def ranks(before: Seen, after: Seen) -> None:
    for name, layer in layers(after).items():
        assert layer.shapes["default"].rank == (1 if name.endswith(".query") else 2)


@moves("adapter.alphas", {"query": 8.0}, kinds=INHERITS, both=SMALL)
def alphas(before: Seen, after: Seen) -> None:
    for name, layer in layers(after).items():
        assert layer.shapes["default"].scale == (8 if name.endswith(".query") else 32) / 2


@moves("adapter.train", ["norms", "embedding"], kinds=INHERITS, both=SMALL)
@moves("adapter.train", ["head"], kinds=["midtrain"], both=SMALL)
def train(before: Seen, after: Seen, value: list[str]) -> None:
    trained = set(after.begun) - set(before.begun)
    parts = {"norms": "norm", "embedding": "embedding", "head": "head"}
    assert all(any(parts[part] in name for name in trained) for part in value)
    assert all(any(parts[part] in name for part in value) for name in trained)
    assert all(not torch.equal(after.begun[name], after.trainer.named[name]) for name in trained)


@moves("adapter.base", "int8", kinds=INHERITS, both=SMALL)
@moves("adapter.base", "int4", kinds=["sft"], both=SMALL)
def base(before: Seen, after: Seen, value: str) -> None:
    """The frozen matrices have as many values as so many bits can tell apart."""
    assert quantised_as(before.trainer.model) is None
    assert quantised_as(after.trainer.model) == value
    for layer in layers(after).values():
        assert all(len(row.unique()) <= 256 for row in whole(layer.weight))


@moves("adapter.base", "float", kinds=["sft"], both={"adapter": {"rank": 2, "base": "int4"}})
def float_base(before: Seen, after: Seen) -> None:
    assert quantised_as(after.trainer.model) is None


def left_whole(seen: Seen) -> bool:
    return any(
        name.startswith("model/") and name.endswith(".safetensors")
        for name in seen.files
        if not any(part in name for part in ("adapter/", "modalities/"))
    )


def left_apart(seen: Seen) -> bool:
    return "model/adapter/adapter_model.safetensors" in seen.files


@moves("adapter.save", "adapter", kinds=KEEPS, both=BOTH)
def save(before: Seen, after: Seen) -> None:
    assert (left_whole(before), left_apart(before)) == (True, True)
    assert (left_whole(after), left_apart(after)) == (False, True)


@moves("adapter.save", "merged", "both", kinds=["sft"], both={"adapter": {"rank": 2, "save": "adapter"}})
def save_merged(before: Seen, after: Seen, value: str) -> None:
    assert (left_whole(after), left_apart(after)) == (True, value == "both")


refuses("adapter.save", "adapter", "say `save: merged`", kinds=["reward"], both=SMALL)
for path, value in (
    ("rank", 2), ("alpha", 2.0), ("kind", "dora"), ("targets", ["query"]), ("ranks", {"query": 1}),
    ("alphas", {"query": 1.0}), ("train", ["norms"]), ("base", "int8"), ("save", "merged"),
):  # fmt: skip
    refuses(f"adapter.{path}", value, "nothing to lay an adapter on", kinds=["pretrain"])


@moves("qat", "int8", "int4", kinds=["pretrain", *INHERITS])
def qat(before: Seen, after: Seen, value: str) -> None:
    """The gradient is that of rounded matrices, whose values are few."""
    rounds = [
        any(hasattr(layer, "weight_fake_quantizer") for layer in seen.trainer.model.modules())
        for seen in (before, after)
    ]
    assert rounds == [False, True]
    assert after.column("grad_norm") != before.column("grad_norm")
