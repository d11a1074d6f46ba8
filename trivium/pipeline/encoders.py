"""What pictures and sounds add to a stage: which encoders its model has, and what these compute."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trivium.lab.planner.work import Phase
from trivium.learn.optimisers import group_of
from trivium.model.config import ModelConfig
from trivium.model.flops import Flops, newton_schulz_flops
from trivium.model.modalities.encoder import EncoderConfig
from trivium.model.modalities.folder import read_modalities
from trivium.model.modalities.projector import ProjectorConfig
from trivium.model.modalities.towers import (
    CACHE_BYTES,
    Modalities,
    ModalitiesConfig,
    PictureConfig,
    SoundsConfig,
)
from trivium.model.unfilled import unfilled
from trivium.pipeline.looking import KINDS, Items
from trivium.pipeline.run import Run
from trivium.stages.parts.modalities import planned

MODEL_WIDTH = 512
"""Of the language model, where only the forms of pictures and sounds are wanted, which it does not change."""


def modalities_of(prepared: Run, name: str, width: int = MODEL_WIDTH) -> ModalitiesConfig | None:
    """What the model that a stage trains can read besides text; None for text alone, or if an encoder that
    is not our own is not on this machine."""
    stage: Any = prepared.nodes[name].stage
    start = getattr(stage, "start", None)
    old = None
    if isinstance(start, str):
        parent = prepared.pending(name, start)
        if parent is not None:
            old = modalities_of(prepared, parent, width)
        elif (folder := _folder(prepared, name, start)) is not None:
            old = read_modalities(folder)
    if stage.kind != "multimodal":
        return old
    named = [tower.folder for tower in stage.towers.values() if tower.folder is not None]
    folders = {one: folder for one in named if (folder := _folder(prepared, name, one)) is not None}
    return old if len(folders) < len(set(named)) else planned(stage.picture, stage.sound, width, folders, old)


def _folder(prepared: Run, name: str, written: str) -> Path | None:
    """The folder of a model that a stage names, where there is one yet."""
    place = prepared.place_of(name, written)
    return place if place is not None and place.is_dir() else None


def encoder_phases(
    config: ModalitiesConfig, share: Items, there: Items, tokens: float, steps: float, muon: bool
) -> Iterator[Phase]:
    """The passes of encoders and projectors over `tokens`, of which pictures and sounds are this share.

    What an encoder that does not learn made of the `there` different ones is kept, if it is not too much."""
    for kind in KINDS:
        tower: PictureConfig | SoundsConfig | None = getattr(config, kind)
        taken, count = (tokens * one for one in share.of(kind))
        if tower is None or not taken:
            continue
        learns = tower.learns
        kept = there.of(kind)
        if not learns and kept[0] * tower.projector.states * _joined(kind, tower.projector) * 4 < CACHE_BYTES:
            once = min(1.0, kept[0] / taken)
        else:
            once = 1.0
        states, length, entering = _read(config, kind, once * taken, once * count)
        into = 3 if learns else 2
        wide, hidden = _joined(kind, tower.projector) * tower.projector.states, tower.projector.width
        projector = into * wide * hidden
        if tower.projector.kind == "mlp":
            projector += 3 * hidden * hidden
        also = Flops(
            layers=2.0 * entering * (2 if learns else 1) + 2.0 * taken * projector,
            optimiser=steps * _muon_flops(config, kind) if muon else 0.0,
        )
        yield Phase(
            "training", states, length, 0.0, 1.0 if learns else None,
            config=_as_layers(tower.encoder.encoder), also=also, encoder=True,
        )  # fmt: skip


def _joined(kind: str, projector: ProjectorConfig) -> int:
    """How many states of an encoder become one token."""
    return projector.join ** (2 if kind == "picture" else 1)


def _read(config: ModalitiesConfig, kind: str, tokens: float, count: float) -> tuple[float, float, float]:
    """The states that an encoder computes for so many tokens, how many each of them meets, and the
    multiplications before its layers."""
    if kind == "picture":
        assert config.picture is not None
        assert config.forms.picture is not None
        vision = config.picture.encoder
        tiles, rows = tokens / config.forms.picture.tokens, vision.patches + vision.with_class
        return tiles * rows, float(rows), tiles * vision.patches * 3 * vision.patch**2 * vision.encoder.width
    assert config.sound is not None
    hearing, join = config.sound.encoder, config.sound.projector.join
    each = tokens * join / max(count, 1e-9) if hearing.frames is None else hearing.frames / 2
    width = hearing.encoder.width
    # The second of two convolutions over three places each halves the frames.
    return count * each, each, count * each * 3 * width * (2 * hearing.mels + width)


def _as_layers(encoder: EncoderConfig) -> ModelConfig:
    """A decoder whose layers have the same matrices."""
    return ModelConfig(
        vocabulary=1, width=encoder.width, layers=encoder.layers, heads=encoder.heads,
        inner_width=encoder.inner_width, context=1, gated=False,
    )  # fmt: skip


def _muon_flops(config: ModalitiesConfig, kind: str) -> float:
    """Muon's own, in a step of an encoder, if it learns, and its projector."""
    with unfilled():
        tower = getattr(Modalities(config), kind)
    learns = getattr(config, kind).learns
    return sum(
        newton_schulz_flops(one.shape[0], one[0].numel())
        for name, one in tower.named_parameters()
        if group_of(name, one) == "matrices" and (learns or name.startswith("projector."))
    )
