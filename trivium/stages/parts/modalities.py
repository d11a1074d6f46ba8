"""What a person says of a model's new eyes and ears, and the towers that follow from it."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from trivium.kit.errors import TriviumError
from trivium.kit.files import read_object
from trivium.kit.numbers import Count
from trivium.kit.settings import Settings
from trivium.model.folder import StoredWeights
from trivium.model.modalities.encoder import EncoderConfig
from trivium.model.modalities.foreign import fill_sound, fill_vision, sound_config, vision_config
from trivium.model.modalities.projector import ProjectorConfig
from trivium.model.modalities.sound import SoundConfig
from trivium.model.modalities.towers import (
    Modalities,
    ModalitiesConfig,
    PictureConfig,
    SoundsConfig,
    initialise,
)
from trivium.model.modalities.vision import VisionConfig
from trivium.model.transformer import Transformer
from trivium.tokens.codebook import MARKS
from trivium.tokens.forms import Forms, filter_of, processor_of
from trivium.tokens.pictures import PictureForm, tokens_of_square
from trivium.tokens.sounds import SoundForm

OWN = "own"
CODEBOOK = "codebook"
FRAMES_PER_STATE = 2
"""The second convolution of a sound encoder halves the frames."""


class Tower(Settings):
    """An encoder and its projector."""

    encoder: str = OWN
    """`own`, a small one that learns from nothing, or a folder of transformers, which stays as it is."""
    projector: Literal["linear", "mlp"] = "mlp"
    """One matrix, or two with a GELU between them (LLaVA-1.5)."""
    layers: Count = Field(default=4, ge=1)
    """Of an own encoder."""
    width: Count = Field(default=128, ge=8)
    """Of an own encoder."""
    train_encoder: bool | None = None
    """Whether the encoder learns; an own one does, one from a folder does not."""

    @property
    def folder(self) -> str | None:
        """The folder of an encoder that is not our own."""
        return None if self.encoder == OWN else self.encoder

    @property
    def learns(self) -> bool:
        """Whether the encoder learns."""
        return self.encoder == OWN if self.train_encoder is None else self.train_encoder

    def shape(self) -> EncoderConfig:
        """The layers of an own encoder."""
        heads = max(1, self.width // 32)
        if self.width % heads or (self.width // heads) % 2:
            raise TriviumError(f"An encoder's `width` is a multiple of 32, not {self.width}.")
        return EncoderConfig(self.width, self.layers, heads, 4 * self.width)


class Pictures(Tower):
    """How the model sees."""

    encoder: str = OWN
    """`own`, a small one that learns from nothing, a folder of transformers, which stays as it is, or
    `codebook`: pictures are tokens of the vocabulary (early fusion), and the model can write them, too."""
    patch: Count = Field(default=8, ge=1)
    """The side of a patch in pixels, of an own encoder or a codebook."""
    codes: Annotated[Count, Field(ge=2, le=65536)] = 512
    """How many different patches a codebook tells apart."""
    tokens: Count | None = Field(default=None, ge=1)
    """Tokens of a picture (of each tile), a square number; neighbouring patches are joined to get there.
    Where it is left out, 16 for an own encoder or a codebook, and one for each patch of another."""
    side: Count | None = Field(default=None, ge=1)
    """The side in pixels to which an own encoder's pictures are brought; one patch for each token where it
    is left out."""
    resize: Literal["pad", "stretch", "crop"] | None = None
    """How a picture becomes square: filled up, stretched, or cut; the encoder's own way if it is left out."""
    tiles: Annotated[Count, Field(ge=1, le=64)] = 1
    """A large or long picture is cut into at most so many tiles, with a small view of the whole before."""
    layer: int = Field(default=-2, le=-1)
    """Which layer of an encoder from a folder is read, counted from the end (LLaVA reads -2)."""

    @model_validator(mode="after")
    def _says_what_it_has(self) -> Self:
        if self.encoder != CODEBOOK:
            if "codes" in self.model_fields_set:
                raise ValueError("`codes` are of a codebook (`encoder: codebook`); leave `codes` out")
            return self
        of_codes = {"encoder", "patch", "codes", "tokens", "side", "resize", "tiles"}
        if more := sorted(self.model_fields_set - of_codes):
            raise ValueError(f"a codebook has no encoder to say `{more[0]}` of; leave `{more[0]}` out")
        return self

    @property
    def folder(self) -> str | None:
        return None if self.encoder == CODEBOOK else super().folder

    def built(self, width: int, folder: Path | None) -> tuple[PictureConfig | None, PictureForm]:
        """The tower for a language model of this width, and how pictures become its tokens."""
        if self.encoder == CODEBOOK:
            return None, self._of_codes()
        if folder is None:
            across = round((self.tokens or 16) ** 0.5)
            side = self.side or across * self.patch
            if side % self.patch:
                raise TriviumError(
                    f"`picture`: a `side` of {side} pixels is no multiple of `patch` {self.patch}."
                )
            vision = VisionConfig(self.shape(), side, self.patch)
            resize, chosen = self.resize or "pad", 3
        else:
            path, processor = folder / "config.json", processor_of(folder)
            vision = vision_config(read_object(path), processor, path, layer=self.layer)
            crops = bool(processor.get("do_center_crop", vision.with_class))
            resize = self.resize or ("crop" if crops else "stretch")
            chosen = filter_of(processor)
        tokens = self.tokens or (16 if folder is None else vision.patches)
        join = tokens_of_square(vision.side, vision.patch, tokens)
        projector = ProjectorConfig(self.projector, vision.encoder.width, width, join)
        form = PictureForm(vision.side, tokens, resize, chosen, self.tiles)
        return PictureConfig(vision, projector, self.learns), form

    def _of_codes(self) -> PictureForm:
        """One token for each patch, between two marks."""
        tokens = self.tokens or 16
        across = round(tokens**0.5)
        if across**2 != tokens or self.side not in (None, across * self.patch) or self.tiles > 1:
            raise TriviumError(
                "`picture`: a codebook has one token for each patch of one tile, so `tokens` is a square "
                f"number and `side` its root times `patch`; here are {tokens} tokens of {self.patch} pixels, "
                f"a side of {self.side or across * self.patch} and {self.tiles} tiles."
            )
        return PictureForm(across * self.patch, tokens + MARKS, self.resize or "pad")


class Sounds(Tower):
    """How the model hears."""

    tokens_per_second: float = Field(default=12.5, gt=0, le=50)
    """Tokens of a second; states of 20 ms are joined to get there."""
    longest: float = Field(default=30.0, gt=0, le=3600)
    """Seconds; longer sounds are refused."""
    mels: Count = Field(default=80, ge=8, le=128)
    """Bands of the spectrogram, of an own encoder."""

    def built(self, width: int, folder: Path | None) -> tuple[SoundsConfig, SoundForm]:
        """The tower for a language model of this width, and how sounds become its tokens."""
        if folder is None:
            hearing = SoundConfig(self.shape(), self.mels)
        else:
            path = folder / "config.json"
            hearing = sound_config(read_object(path), path)
        join = max(1, round(50 / self.tokens_per_second))
        longest = self.longest if hearing.frames is None else min(self.longest, hearing.frames / 100)
        projector = ProjectorConfig(self.projector, hearing.encoder.width, width, join)
        return SoundsConfig(hearing, projector, self.learns), SoundForm(join * FRAMES_PER_STATE, longest)


def planned(
    picture: Pictures | None, sound: Sounds | None, width: int, folders: Mapping[str, Path],
    old: ModalitiesConfig | None = None,
) -> ModalitiesConfig:  # fmt: skip
    """The modalities of a model of this width; `folders` holds the encoders that are not our own.

    What is not said stays as it is in the `old` ones, those of the parent."""
    seen = None if picture is None else picture.built(width, folders.get(picture.encoder))
    heard = None if sound is None else sound.built(width, folders.get(sound.encoder))
    found = old or ModalitiesConfig(Forms())
    if seen is not None:
        found = replace(found, picture=seen[0], forms=replace(found.forms, picture=seen[1], codebook=None))
    if heard is not None:
        found = replace(found, sound=heard[0], forms=replace(found.forms, sound=heard[1]))
    return found


def add_modalities(
    model: Transformer, config: ModalitiesConfig, folders: Mapping[str, Path], towers: Mapping[str, Tower],
    seed: int,
) -> Modalities:  # fmt: skip
    """Give a model new towers; those that it has already, of the same shape, stay as they are."""
    before = model.modalities
    modalities = Modalities(config)
    deviation = float(model.embedding.weight.detach().float().std())
    initialise(modalities, seed, deviation)
    for name, tower in towers.items():
        made = getattr(modalities, name)
        if tower.folder is not None:
            weights = StoredWeights(folders[tower.folder])
            prefix = _prefix(weights, name)
            fill = fill_vision if name == "picture" else fill_sound
            fill(made.encoder, lambda stored: weights.tensor(stored).float(), prefix)  # noqa: B023
    for name in ("picture", "sound"):
        old = None if before is None else getattr(before, name)
        if old is not None and name not in towers:
            setattr(modalities, name, old)
    modalities.to(device=model.device, dtype=model.dtype)
    model.modalities = modalities
    return modalities


def _prefix(weights: StoredWeights, name: str) -> str:
    """What stands before the names of an encoder's tensors in a folder."""
    last = "embeddings.position_embedding.weight" if name == "picture" else "encoder.conv1.weight"
    found = [one for one in weights.files if one.endswith(last) and "text_model" not in one]
    if len(found) != 1:
        raise TriviumError(f"{weights.folder} holds no encoder of the kind that `{name}` needs.")
    return found[0].removesuffix(last) + ("" if name == "picture" else "encoder.")
