"""Encoders with their projectors, and the place where their rows take those of text."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from dataclasses import asdict, dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from trivium.model.modalities.encoder import EncoderConfig
from trivium.model.modalities.projector import Projector, ProjectorConfig, pixel_shuffled, stacked
from trivium.model.modalities.sound import SoundConfig, SoundEncoder
from trivium.model.modalities.vision import VisionConfig, VisionEncoder
from trivium.model.uncompiled import uncompiled
from trivium.tokens.forms import Forms
from trivium.tokens.items import FIRST, LIBRARY, Item, content_of, place_of

CACHE_BYTES = 256 << 20
"""How much of what encoders computed is kept, so that an item is not encoded in every epoch and question."""


Encoder = TypeVar("Encoder", VisionConfig, SoundConfig)


@dataclass(frozen=True)
class TowerConfig(Generic[Encoder]):
    """What turns pictures or sounds into rows."""

    encoder: Encoder
    projector: ProjectorConfig
    learns: bool = True
    """Whether stages train the encoder; the projector always learns."""


PictureConfig = TowerConfig[VisionConfig]
SoundsConfig = TowerConfig[SoundConfig]


@dataclass(frozen=True)
class ModalitiesConfig:
    """Which modalities a model has besides text."""

    forms: Forms
    picture: PictureConfig | None = None
    sound: SoundsConfig | None = None

    def written(self) -> dict[str, Any]:
        return {"version": 1, **asdict(self)}


def config_from(content: dict[str, Any], forms: Forms) -> ModalitiesConfig:
    """The config that `written` wrote."""
    picture, sound = content.get("picture"), content.get("sound")
    made_picture = made_sound = None
    if picture is not None:
        vision = dict(picture["encoder"])
        vision |= {key: tuple(vision[key]) for key in ("mean", "deviation")}
        vision["encoder"] = EncoderConfig(**vision["encoder"])
        made_picture = PictureConfig(
            VisionConfig(**vision), ProjectorConfig(**picture["projector"]), bool(picture.get("learns", True))
        )
    if sound is not None:
        hearing = dict(sound["encoder"])
        hearing["encoder"] = EncoderConfig(**hearing["encoder"])
        made_sound = SoundsConfig(
            SoundConfig(**hearing), ProjectorConfig(**sound["projector"]), bool(sound.get("learns", True))
        )
    return ModalitiesConfig(forms, made_picture, made_sound)


class PictureTower(nn.Module):
    """A vision encoder and its projector."""

    def __init__(self, config: PictureConfig) -> None:
        super().__init__()
        self.join = config.projector.join
        self.encoder = VisionEncoder(config.encoder)
        self.projector = Projector(config.projector, self.join**2)

    def encode(self, items: list[Item], device: torch.device) -> list[Tensor]:
        """The joined states of pictures with as many tiles each: [tokens, states]."""
        tiles = torch.from_numpy(np.stack([item.data for item in items])).to(device)
        states = pixel_shuffled(self.encoder(tiles.flatten(0, 1)), self.join)
        return list(states.unflatten(0, tiles.shape[:2]).flatten(1, 2))


class SoundTower(nn.Module):
    """A sound encoder and its projector."""

    def __init__(self, config: SoundsConfig) -> None:
        super().__init__()
        self.join = config.projector.join
        self.encoder = SoundEncoder(config.encoder)
        self.projector = Projector(config.projector, self.join)

    def encode(self, items: list[Item], device: torch.device) -> list[Tensor]:
        """The joined states of sounds of one length: [tokens, states]."""
        samples = torch.from_numpy(np.stack([item.data for item in items])).to(device)
        states = stacked(self.encoder(samples), self.join)
        return [rows[: item.tokens] for rows, item in zip(states, items, strict=True)]


class Modalities(nn.Module):
    """A model's eyes and ears: rows for the ids that name pictures and sounds."""

    def __init__(self, config: ModalitiesConfig) -> None:
        super().__init__()
        self.config = config
        self.picture = None if config.picture is None else PictureTower(config.picture)
        self.sound = None if config.sound is None else SoundTower(config.sound)
        self._cache: OrderedDict[tuple[str, int], Tensor] = OrderedDict()
        self._cached_bytes = 0
        self._seen: list[tuple[int, int]] = []

    def hold_still(self) -> None:
        """Freeze the encoders that stay as they are, here and in every later stage."""
        for name in ("picture", "sound"):
            config = getattr(self.config, name)
            if config is not None and not config.learns:
                getattr(self, name).encoder.requires_grad_(False)

    @uncompiled
    def places(self, tokens: Tensor) -> tuple[Tensor, Tensor] | None:
        """Where among these ids [tokens] items are, and their rows [places, width]; None of text alone."""
        inside = tokens >= FIRST
        if not bool(inside.any()):
            return None
        places = inside.nonzero().squeeze(1)
        named = tokens[places].tolist()
        contents = list(dict.fromkeys(map(content_of, named)))
        rows = self.rows(contents, tokens.device)
        starts, total = {}, 0
        for content in contents:
            starts[content], total = total, total + len(rows[content])
        wanted = [starts[content_of(one)] + place_of(one) for one in named]
        every = torch.cat([rows[content] for content in contents])
        return places, every[torch.tensor(wanted, device=tokens.device)]

    def rows(self, contents: list[int], device: torch.device) -> dict[int, Tensor]:
        """The rows of items, each [tokens, width]; those of one shape are computed together."""
        groups: dict[tuple[Any, ...], dict[int, Item]] = defaultdict(dict)
        for content in contents:
            item = LIBRARY.get(content)
            groups[(item.kind, *item.data.shape)][content] = item
        found: dict[int, Tensor] = {}
        for (kind, *_), items in groups.items():
            tower = self.picture if kind == "picture" else self.sound
            assert tower is not None, f"the tokenizer made a {kind} of a model that takes none"
            states = self._states(kind, tower, items, device)
            rows = tower.projector(torch.cat([states[content] for content in items]))
            found |= dict(zip(items, rows.split([item.tokens for item in items.values()]), strict=True))
        return found

    def _states(
        self, kind: str, tower: PictureTower | SoundTower, items: dict[int, Item], device: torch.device
    ) -> dict[int, Tensor]:
        """What the encoder makes of items, [tokens, states] each: from the cache where it does not learn."""
        learns = torch.is_grad_enabled() and any(one.requires_grad for one in tower.encoder.parameters())
        if learns:
            states = tower.encode(list(items.values()), device)
            return dict(zip(items, states, strict=True))
        self._forget_if_changed()
        new = {content: item for content, item in items.items() if (kind, content) not in self._cache}
        fresh: dict[int, Tensor] = {}
        if new:
            # Out of inference mode, for a later pass may train a projector on them.
            with torch.inference_mode(False), torch.no_grad():
                states = tower.encode(list(new.values()), device)
                fresh = {content: one.clone() for content, one in zip(new, states, strict=True)}
        found = {content: fresh.get(content, self._cache.get((kind, content))) for content in items}
        for content, one in fresh.items():
            self._cache[kind, content] = one
            self._cached_bytes += one.nbytes
        while self._cached_bytes > CACHE_BYTES:
            _, oldest = self._cache.popitem(last=False)
            self._cached_bytes -= oldest.nbytes
        return {content: one for content, one in found.items() if one is not None}

    def _forget_if_changed(self) -> None:
        """Empty the cache if an encoder's weights are others than those that filled it."""
        towers = [tower for tower in (self.picture, self.sound) if tower is not None]
        weights = [one for tower in towers for one in tower.encoder.parameters()]
        seen = [(one.data_ptr(), 0 if one.is_inference() else one._version) for one in weights]
        if seen != self._seen:
            self._seen = seen
            self._cache.clear()
            self._cached_bytes = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> Modalities:
        """A copy with the same weights and an empty cache."""
        import copy

        new = Modalities(self.config)
        memo[id(self)] = new
        for name, parameter in self.named_parameters():
            path, _, leaf = name.rpartition(".")
            new.get_submodule(path)._parameters[leaf] = copy.deepcopy(parameter, memo)
        return new.train(self.training)


@torch.no_grad()
def initialise(modalities: Modalities, seed: int, deviation: float) -> None:
    """Fill every weight from one seed; the projectors' rows vary as the embeddings of tokens do."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(modalities.named_parameters()):
        norm = "norm" in name
        if parameter.dim() < 2:
            parameter.fill_(1.0 if norm and name.endswith("weight") else 0.0)
            continue
        if name.endswith(("output.weight", "down.weight")):
            # As in the language model, what a layer adds starts at zero.
            parameter.zero_()
            continue
        inputs = parameter[0].numel()
        scale = 0.02 if "embedding" in name else inputs**-0.5
        if name.endswith("projector.out.weight"):
            scale *= deviation
        values = torch.empty(parameter.shape, dtype=torch.float32).normal_(0.0, scale, generator=generator)
        parameter.copy_(values)
