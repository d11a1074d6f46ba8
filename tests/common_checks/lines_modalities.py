"""What a multimodal stage says of pictures, sounds and the new parts of the model."""

from __future__ import annotations

from base64 import b64decode
from typing import Any

import numpy as np
import pytest
import torch
from lines import moves
from tiny_run import Seen

from trivium.data.shards import Shards
from trivium.kit.files import load_tensors, read_json
from trivium.tokens.items import FIRST, LIBRARY, contents_in

KIND = ["multimodal"]
HEARD: dict[str, Any] = {
    "data": "sounds.jsonl", "picture": None, "sound": {"layers": 1, "width": 32},
}  # fmt: skip
"""A stage that learns to hear."""


def towers(seen: Seen) -> dict[str, Any]:
    """What the saved model says of its new parts."""
    return dict(read_json(seen.place / "model" / "modalities" / "config.json"))


def new_parts(seen: Seen) -> dict[str, torch.Tensor]:
    """The saved weights of the new parts."""
    return load_tensors(seen.place / "model" / "modalities" / "model.safetensors")


def item_tokens(seen: Seen) -> list[int]:
    """How many tokens each document spends on pictures or sounds."""
    folder = next(seen.folder.glob("tokenised/*"))
    shards = Shards(folder)
    return [int((shards.document(index) >= FIRST).sum()) for index in range(len(shards))]


def first_item(seen: Seen) -> np.ndarray:
    """The pixels or samples of the first document's item, as they were kept."""
    shards = Shards(next(seen.folder.glob("tokenised/*")))
    return LIBRARY.get(contents_in(shards.document(0))[0]).data


@moves("picture.tokens", 16, kinds=KIND)
def tokens_of_a_picture(before: Seen, after: Seen) -> None:
    assert set(item_tokens(before)) == {4}
    assert set(item_tokens(after)) == {16}


@moves("picture.patch", 8, kinds=KIND)
def patch(before: Seen, after: Seen) -> None:
    assert first_item(before).shape == (1, 8, 8, 3)
    assert first_item(after).shape == (1, 16, 16, 3)
    assert new_parts(after)["picture.encoder.patches.weight"].shape[1] == 3 * 8 * 8


@moves("picture.side", 16, kinds=KIND)
def side(before: Seen, after: Seen) -> None:
    """Four patches become one token."""
    assert set(item_tokens(after)) == {4}
    assert first_item(after).shape == (1, 16, 16, 3)
    assert towers(after)["picture"]["projector"]["join"] == 2


@moves("picture.resize", "stretch", "crop", kinds=KIND)
def resize(before: Seen, after: Seen) -> None:
    """The pictures are wider than high: filled up they have grey rows, else none."""
    assert (first_item(before)[0, 0] == 128).all()
    assert not (first_item(after)[0, 0] == 128).any()


@moves("picture.resize", "pad", kinds=KIND, both={"picture.resize": "stretch"})
def padded(before: Seen, after: Seen) -> None:
    assert (first_item(after)[0, 0] == 128).all()


@moves("picture.tiles", 3, kinds=KIND, both={"picture.side": 8, "picture.tokens": 1, "picture.patch": 8})
def tiles(before: Seen, after: Seen) -> None:
    """Ten pixels are wider than one tile of eight: two tiles, and the whole before them."""
    assert set(item_tokens(before)) == {1}
    assert set(item_tokens(after)) == {3}


@moves(
    "picture.codes", 3, kinds=KIND,
    both={
        "picture.encoder": "codebook", "picture.codes": 2, "picture.layers": None, "picture.width": None,
        "steps_frozen": 0.0,
    },
)  # fmt: skip
def codes(before: Seen, after: Seen) -> None:
    """Each is 4 x 4 pixels of three bytes."""
    sizes = [len(b64decode(towers(seen)["forms"]["codebook"]["pixels"])) for seen in (before, after)]
    assert sizes == [2 * 48, 3 * 48]


@moves("picture.layers", 2, kinds=KIND)
def layers(before: Seen, after: Seen) -> None:
    assert "picture.encoder.encoder.layers.1.up.weight" in new_parts(after)
    assert "picture.encoder.encoder.layers.1.up.weight" not in new_parts(before)


@moves("picture.width", 64, kinds=KIND)
def width(before: Seen, after: Seen) -> None:
    assert new_parts(after)["picture.encoder.patches.weight"].shape[0] == 64


@moves("picture.projector", "linear", kinds=KIND)
def projector(before: Seen, after: Seen) -> None:
    assert "picture.projector.up.weight" in new_parts(before)
    assert "picture.projector.up.weight" not in new_parts(after)


@moves("picture.projector", "mlp", kinds=KIND, both={"picture.projector": "linear"})
def two_matrices(before: Seen, after: Seen) -> None:
    assert "picture.projector.up.weight" in new_parts(after)


@moves("picture.train_encoder", False, kinds=KIND)
def train_encoder(before: Seen, after: Seen) -> None:
    name = "modalities.picture.encoder.patches.weight"
    assert name in before.begun
    assert name not in after.begun
    assert "modalities.picture.projector.out.weight" in after.begun


@moves("picture.encoder", "clip", kinds=KIND, both={"picture.tokens": None, "picture.patch": None})
def encoder(before: Seen, after: Seen) -> None:
    """Its weights are those of the folder, and stay."""
    theirs = load_tensors(after.inputs["clip"] / "model.safetensors")
    stored = next(one for name, one in theirs.items() if name.endswith("position_embedding.weight"))
    torch.testing.assert_close(new_parts(after)["picture.encoder.position_embedding"], stored)
    assert not any("picture.encoder" in name for name in after.begun)


@moves("picture.layer", -1, kinds=KIND, both={
    "picture.encoder": "clip", "picture.tokens": None, "picture.patch": None})  # fmt: skip
def layer(before: Seen, after: Seen) -> None:
    counts = [towers(seen)["picture"]["encoder"]["encoder"]["layers"] for seen in (before, after)]
    assert counts == [1, 2]


@moves("steps_frozen", 0.5, kinds=KIND)
def steps_frozen(before: Seen, after: Seen) -> None:
    """Of two steps the language model takes part in one."""
    count = before.moments["count.embedding.weight"], after.moments["count.embedding.weight"]
    assert list(map(int, count)) == [2, 1]
    assert int(after.moments["count.modalities.picture.projector.out.bias"]) == 2


@moves("new_parts_rate", 1.0, kinds=KIND, both={"steps": 1})
def new_parts_rate(before: Seen, after: Seen) -> None:
    """What is new moved a tenth as far."""
    name = "modalities.picture.projector.out.weight"
    moved = [
        float((new_parts(seen)["picture.projector.out.weight"] - seen.begun[name]).norm())
        for seen in (before, after)
    ]
    assert moved[0] == pytest.approx(10 * moved[1], rel=0.05)


# sounds


@moves("sound.tokens_per_second", 25.0, kinds=KIND, both=HEARD)
def tokens_of_a_sound(before: Seen, after: Seen) -> None:
    for few, many in zip(item_tokens(before), item_tokens(after), strict=True):
        assert 2 * few - 1 <= many <= 2 * few


@moves("sound.longest", 0.1, kinds=KIND, both=HEARD, refused="the model hears 0.1 at most")
def longest(before: Seen, after: Seen) -> None:
    """Never reached."""


@moves("sound.mels", 40, kinds=KIND, both=HEARD)
def mels(before: Seen, after: Seen) -> None:
    assert new_parts(after)["sound.encoder.first.weight"].shape[1] == 40


@moves("sound.layers", 2, kinds=KIND, both=HEARD)
def layers_of_hearing(before: Seen, after: Seen) -> None:
    assert "sound.encoder.encoder.layers.1.up.weight" in new_parts(after)


@moves("sound.width", 64, kinds=KIND, both=HEARD)
def width_of_hearing(before: Seen, after: Seen) -> None:
    assert new_parts(after)["sound.encoder.first.weight"].shape[0] == 64


@moves("sound.projector", "linear", kinds=KIND, both=HEARD)
def projector_of_hearing(before: Seen, after: Seen) -> None:
    assert "sound.projector.up.weight" not in new_parts(after)


@moves("sound.projector", "mlp", kinds=KIND, both={**HEARD, "sound.projector": "linear"})
def two_matrices_of_hearing(before: Seen, after: Seen) -> None:
    assert "sound.projector.up.weight" in new_parts(after)


@moves("sound.train_encoder", False, kinds=KIND, both=HEARD)
def train_hearing(before: Seen, after: Seen) -> None:
    assert "modalities.sound.encoder.first.weight" in before.begun
    assert "modalities.sound.encoder.first.weight" not in after.begun


@moves("sound.encoder", "whisper", kinds=KIND, both=HEARD)
def encoder_of_hearing(before: Seen, after: Seen) -> None:
    theirs = load_tensors(after.inputs["whisper"] / "model.safetensors")
    stored = next(one for name, one in theirs.items() if name.endswith("encoder.conv1.weight"))
    torch.testing.assert_close(new_parts(after)["sound.encoder.first.weight"], stored)
