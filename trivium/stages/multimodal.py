"""Multimodal mid-training: a trained language model learns to see and to hear.

In LLaVA's two steps (Liu et al. 2023): at first only the projector learns, and with it an encoder that begins
from nothing, on a frozen language model; then the language model learns as well, among text that it knows.
Or by early fusion: pictures are tokens of the vocabulary, and the model learns to write them, too.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator
from torch import Tensor

from trivium.kit.errors import TriviumError
from trivium.learn.optimisers import LearningRates
from trivium.learn.trainer import Reshape
from trivium.model.hub import resolve
from trivium.model.modalities.folder import read_modalities
from trivium.model.modalities.towers import Modalities, ModalitiesConfig
from trivium.model.transformer import Transformer
from trivium.model.unfilled import unfilled
from trivium.stages.parts.early_fusion import grow_codes, with_codebook, with_planned_codes
from trivium.stages.parts.modalities import CODEBOOK, Pictures, Sounds, Tower, add_modalities, planned
from trivium.stages.parts.shapes import planned_shape, shape_of, size_of
from trivium.stages.parts.stage import Reference
from trivium.stages.parts.training import Opened
from trivium.stages.sft import Sft
from trivium.tokens.pictures import pillow

Moments = Mapping[str, Tensor]


class Multimodal(Sft):
    """Teach a model to read pictures and sounds in conversations, beside text."""

    kind: Literal["multimodal"]  # type: ignore[assignment]
    """Multimodal mid-training."""
    version: ClassVar[int] = 2

    picture: Pictures | None = None
    """How pictures are seen; where it is left out, as the parent does, if it does."""
    sound: Sounds | None = None
    """How sounds are heard; where it is left out, as the parent does, if it does."""
    steps_frozen: float = Field(default=0.3, ge=0, le=1)
    """The share of the stage in which only the new parts learn, and the language model does not."""
    new_parts_rate: float = Field(default=10.0, gt=0)
    """How much faster encoders and projectors learn than the language model."""
    optimiser: Literal["muon", "adamw"] = "muon"
    """`muon` for matrices with AdamW for the rest, or `adamw` for all weights."""

    @model_validator(mode="after")
    def something_is_learnt_to_be_read(self) -> Self:
        if self.picture is None and self.sound is None:
            raise ValueError("say in `picture` or `sound` what the model shall learn to read, or use `sft`")
        if self.draft_heads:
            raise ValueError("`draft_heads` are trained by an `sft` stage after this one; leave it out")
        said = self.steps_frozen if "steps_frozen" in self.model_fields_set else 0
        if said and self.fuses_early and self.sound is None:
            raise ValueError("a codebook has no parts to learn alone; leave `steps_frozen` out")
        return self

    def counted(self) -> dict[str, Any]:
        """A stage without a codebook is what it was before there were any."""
        found = super().counted()
        if self.picture is not None and not self.fuses_early:
            found["picture"] = {key: one for key, one in found["picture"].items() if key != "codes"}
        return found

    @property
    def fuses_early(self) -> bool:
        """Whether pictures are tokens of the vocabulary."""
        return self.picture is not None and self.picture.encoder == CODEBOOK

    @property
    def towers(self) -> dict[str, Tower]:
        """What is added, by its name in the model."""
        every = {"picture": self.picture, "sound": self.sound}
        return {name: tower for name, tower in every.items() if tower is not None}

    def references(self) -> list[Reference]:
        """The parent and the data, and the folders of encoders that are not our own."""
        return super().references() + [
            Reference(f"{name}.encoder", tower.folder, ("model",))
            for name, tower in self.towers.items()
            if tower.folder is not None
        ]

    def plan(self, inputs: Mapping[str, Path | Mapping[str, Any]]) -> dict[str, Any]:
        numbers = super().plan(inputs)
        config = planned_shape(inputs.get(self.start))
        if config is not None and self.fuses_early and self.picture is not None:
            config = with_planned_codes(config, self.picture)
            numbers |= {**size_of(config), "model": shape_of(config)}
        places = {tower.folder: inputs.get(tower.folder) for tower in self.towers.values() if tower.folder}
        folders = {name: place for name, place in places.items() if isinstance(place, Path)}
        if config is not None and len(folders) == len(places):
            with unfilled():
                added = Modalities(planned(self.picture, self.sound, config.width, folders))
            numbers["parameters"] += sum(one.numel() for one in added.parameters())
        return numbers

    def check_machine(self) -> None:
        super().check_machine()
        if self.picture is not None:
            pillow()

    def folders(self, opened: Opened[Any]) -> dict[str, Path]:
        """The folders of the encoders that are not our own."""
        named = [tower.folder for tower in self.towers.values() if tower.folder is not None]
        return {name: resolve(str(opened.work.path(name))) for name in named}

    def modalities(self, opened: Opened[Any]) -> ModalitiesConfig:
        """What the model will be able to read: what this stage adds, and what its parent had."""
        old = read_modalities(opened.folder) if opened.parent_tokenizer.forms is not None else None
        return planned(self.picture, self.sound, opened.config.width, self.folders(opened), old)

    def read(self, opened: Opened[Any]) -> None:
        """As in fine-tuning, with pictures and sounds as tokens."""
        forms, tokenizer = self.modalities(opened).forms, opened.parent_tokenizer
        tokenizer = (
            with_codebook(opened.work, tokenizer, forms, self.picture, self.data)
            if self.fuses_early and self.picture is not None
            else tokenizer.with_forms(forms)
        )
        opened.tokenizer = opened.parent_tokenizer = tokenizer
        super().read(opened)

    def change(self, opened: Opened[Any]) -> None:
        if self.fuses_early:
            grow_codes(opened.model, opened.folder, opened.parent_tokenizer, opened.work.seed)
        super().change(opened)
        config, model = self.modalities(opened), opened.model
        assert opened.tokenizer.forms is not None, "set when the data was read"
        config = replace(config, forms=opened.tokenizer.forms)
        before = sum(one.numel() for one in model.parameters())
        add_modalities(model, config, self.folders(opened), self.towers, opened.work.seed)
        self._let_learn(model)
        opened.work.change("parameters", before, sum(one.numel() for one in model.parameters()))

    def _let_learn(self, model: Transformer) -> None:
        """Train the towers, but for encoders that stay as they are, the parent's among them."""
        assert model.modalities is not None
        model.modalities.requires_grad_(True)
        model.modalities.hold_still()

    def learning_rates(self, opened: Opened[Any]) -> LearningRates:
        """Those of fine-tuning, and faster ones for what is new."""
        if self.adapter is not None:
            # An adapter froze everything that it found; the towers learn beside it.
            self._let_learn(opened.model)
        rates = replace(super().learning_rates(opened), new_parts=self.new_parts_rate)
        if any(is_new(name) for name, _ in opened.model.named_parameters()):
            opened.work.change(
                "learning rate of the new parts", rates.matrices, rates.matrices * self.new_parts_rate
            )
        return rates

    def reshapes(self, opened: Opened[Any]) -> Sequence[Reshape]:
        """The language model is frozen before the first step and freed after a share of all."""
        step = round(self.steps_frozen * opened.batches.steps)
        if step == 0 or (self.fuses_early and self.sound is None):
            return ()
        if not any(one.requires_grad for name, one in opened.model.named_parameters() if is_new(name)):
            raise TriviumError(
                f"{opened.work.stage}: nothing of the new parts learns, so there is nothing to do in "
                "`steps_frozen`; set it to 0."
            )
        frozen = _Frozen()
        return (Reshape(0, frozen.freeze), Reshape(step, frozen.free))


def is_new(name: str) -> bool:
    """Whether a parameter is of an encoder or a projector."""
    return name.startswith("modalities.")


@dataclass
class _Frozen:
    """What the language model trains when it is not frozen, and the optimiser's state of it meanwhile."""

    names: list[str] = field(default_factory=list)
    moments: dict[str, Tensor] = field(default_factory=dict)

    def freeze(self, model: Transformer) -> Callable[[Moments], dict[str, Tensor]]:
        """Leave only the new parts trained."""
        trained = [name for name, one in model.named_parameters() if one.requires_grad and not is_new(name)]
        self.names = trained or self.names
        for name in trained:
            model.get_parameter(name).requires_grad_(False)
        return self._put_aside

    def _put_aside(self, state: Moments) -> dict[str, Tensor]:
        self.moments = {name: moment.clone() for name, moment in state.items() if name != "steps"}
        return dict(state)

    def free(self, model: Transformer) -> Callable[[Moments], dict[str, Tensor]]:
        """Train again what was trained."""
        for name in self.names:
            model.get_parameter(name).requires_grad_(True)
        return lambda state: {**self.moments, **state}
