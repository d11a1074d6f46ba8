"""Growth in the middle of a training: where it happens, and how the loop carries it out."""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Self

from pydantic import Field, field_validator, model_validator
from torch import Tensor

from trivium.kit.errors import TriviumError
from trivium.kit.numbers import Count
from trivium.kit.settings import Settings
from trivium.learn.checkpoints import place_of
from trivium.learn.trainer import Reshape
from trivium.model.blends import blend, settle
from trivium.model.config import ModelConfig
from trivium.model.deepen import LAYER, blocks_for
from trivium.model.flops import flops_per_token, parameter_count
from trivium.model.growth import (
    TOLERANCE,
    GrowthSettings,
    added_layers,
    become,
    grow,
    grown_config,
    largest_difference,
    probe,
)
from trivium.model.masks import set_mask
from trivium.model.modalities.folder import refuse_modalities
from trivium.model.transformer import Transformer
from trivium.stages.parts.shapes import shape_of
from trivium.stages.parts.stage import Work
from trivium.stages.parts.training import Opened

TAKES_STEPS = ("masked", "learned")
"""Ways of growing that go on for some steps."""
Follows = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
"""How the optimiser's state follows a change of the model's shape."""


class GrowthPoint(GrowthSettings):
    """A growth of the model while it trains."""

    at: Annotated[float, Field(gt=0, lt=1)] | str
    """When: a share of the stage (`0.5` or `50%`), `step=1200`, or `tokens=2M`."""
    warmup: Count = 0
    """Over so many steps after the growth the learning rate rises again from near zero."""
    optimiser_state: str = Field(default="keep", pattern="^(keep|reset)$")
    """Whether the optimiser's state grows along, scaled as the gradients are."""
    steps: Count = Field(default=100, ge=1)
    """With `method: masked` the mask of the new layers rises from 0 to 1 over so many steps; with `learned`
    so many learn how the new layers are made of the old ones."""
    freeze: bool = False
    """Train only the new layers from here on (LLaMA Pro)."""

    @field_validator("at")
    @classmethod
    def at_is_a_place(cls, value: float | str) -> float | str:
        if isinstance(value, str) and value.endswith("%"):
            value = float(value.removesuffix("%")) / 100
            if not 0 < value < 1:
                raise ValueError("a growth lies within its stage: say more than 0% and less than 100%")
        elif isinstance(value, str):
            unit, _, _ = value.partition("=")
            if unit not in ("step", "tokens") or place_of(value) is None:
                raise ValueError(f"'{value}' names no place; write 0.5, 50%, step=1200 or tokens=2M")
        return value

    @model_validator(mode="after")
    def nothing_new_to_freeze_for(self) -> Self:
        """Layers that are sums of all old ones are all new."""
        if self.freeze and self.method == "learned":
            raise ValueError("`method: learned` makes all layers new, so there are no old ones to `freeze`")
        return self

    def step(self, steps: int, batch: int) -> int:
        """The number of steps before it, in a stage of so many, each of about so many tokens."""
        if isinstance(self.at, float):
            return round(self.at * steps)
        place = place_of(self.at)
        assert place is not None
        unit, goal = place
        return goal if unit == "step" else math.ceil(goal / batch)


class Growing(Settings):
    """A training in which the model grows."""

    grow: list[GrowthPoint] = []
    """Where the model becomes larger while it trains, and how."""

    @model_validator(mode="after")
    def all_weights_grow(self) -> Self:
        """What lies on the weights would have to grow along."""
        for name in ("adapter", "qat", "train_only"):
            if self.grow and getattr(self, name):
                raise ValueError(f"a model does not `grow` under `{name}`: make it a `grow` stage before")
        return self

    def grown_numbers(self, config: ModelConfig) -> dict[str, Any]:
        """What a plan says of the model that this one becomes, with its shape for the stages after it."""
        for point in self.grow:
            config = grown_config(config, point)
        numbers = {"layers": config.layers, "width": config.width, "heads": config.heads}
        grown = numbers | {"parameters": parameter_count(config)} if self.grow else {}
        return {**grown, "model": shape_of(config)}

    def grown_flops(self, config: ModelConfig, tokens: int, batch: int, context: int) -> float:
        """What training so many tokens costs while the model grows."""
        steps = max(1, round(tokens / batch))
        total, done = 0.0, 0
        for point in [*self.grow, None]:
            until = steps if point is None else point.step(steps, batch)
            total += flops_per_token(config, context) * tokens * (until - done) / steps
            if point is not None:
                config, done = grown_config(config, point), until
        return total

    def findings(self, opened: Opened[Any]) -> dict[str, Any]:
        found: dict[str, Any] = super().findings(opened)  # type: ignore[misc]
        if self.grow:
            config = opened.model.config
            found |= {"parameters": parameter_count(config), "layers": config.layers}
        return found

    def reshapes(self, opened: Opened[Any]) -> list[Reshape]:
        """The growths as the loop takes them."""
        if self.grow:
            opened.new_layers = new_layers(opened.model.config, self.grow)
        return reshapes(
            opened.work, self.grow, opened.batches.steps, opened.settings.batch or 1, opened.context,
            opened.model.config,
        )  # fmt: skip


def new_layers(config: ModelConfig, points: Sequence[GrowthPoint]) -> tuple[int, ...]:
    """The layers that the last growth adds, none where it makes all larger."""
    found: tuple[int, ...] = ()
    for point in points:
        found = added_layers(config, point)
        config = grown_config(config, point)
    return found


def reshapes(
    work: Work, points: Sequence[GrowthPoint], steps: int, batch: int, context: int, config: ModelConfig
) -> list[Reshape]:
    """The growths of a stage as the loop takes them, in their order."""
    found: list[Reshape] = []
    for place, point in enumerate(points):
        step = point.step(steps, batch)
        before = found[-1].step if found else 0
        if not before < step < steps:
            raise TriviumError(
                f"{work.stage}: the growth at {point.at} falls on step {step}; it has to lie after step "
                f"{before} and before the last, {steps}."
            )
        seed = work.seed + 1_000 * (place + 1)
        learned = point.method == "learned"
        found.append(
            Reshape(
                step, _grows(work, point, step, seed, context), point.warmup,
                freezes=point.freeze or learned, passing=point.method in TAKES_STEPS,
            )
        )  # fmt: skip
        found += _transition(work, point, config, step, steps)
        config = grown_config(config, point)
    return found


def _transition(work: Work, point: GrowthPoint, config: ModelConfig, step: int, steps: int) -> list[Reshape]:
    """What follows a growth that takes steps: a mask that rises, or shares that become weights."""
    if point.method not in TAKES_STEPS or point.layers is None:
        return []
    if step + point.steps >= steps:
        raise TriviumError(
            f"{work.stage}: the growth after step {step} takes {point.steps} steps, and the stage ends after "
            f"{steps}; lower its `steps`."
        )
    if point.method == "learned":
        return [Reshape(step + point.steps, _settles)]
    layers = added_layers(config, point)
    return [
        Reshape(step + number - 1, _raises(layers, number / point.steps), passing=number < point.steps)
        for number in range(1, point.steps + 1)
    ]


def _grows(
    work: Work, point: GrowthPoint, step: int, seed: int, context: int
) -> Callable[[Transformer], Follows]:
    """The change of one growth point, alike whenever it is made."""

    def apply(model: Transformer) -> Follows:
        refuse_modalities(model, work.stage, "grow")
        before = copy.deepcopy(model)
        weights = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
        found = grow(model.config, weights, point, seed=seed)
        become(model, found.config, found.weights)
        if point.method == "masked":
            set_mask(model, found.new_layers, 0.0)
        elif point.method == "learned":
            assert point.layers is not None
            blend(model, weights, blocks_for(before.config.layers, point.layers, point.method))
        length = min(context, model.config.reach)
        moved = largest_difference(before, model, probe(model.config.vocabulary, length))
        sizes = parameter_count(before.config), parameter_count(model.config)
        work.change(f"parameters after step {step}", *sizes)
        if point.keeps_function and moved > TOLERANCE:
            raise TriviumError(
                f"{work.stage}: growing after step {step} moved the logits by {moved:.2g}, more than "
                f"{TOLERANCE}; leave this growth out, or make it a stage with `exact: false`."
            )
        if point.freeze:
            fresh = tuple(f"layers.{layer}." for layer in found.new_layers)
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(name.startswith(fresh))
        if point.optimiser_state == "reset":
            return _nothing
        return _without_layers if point.method == "learned" else found.moments

    return apply


def _raises(layers: Sequence[int], share: float) -> Callable[[Transformer], Follows]:
    """A step of the rising mask of these layers; the optimiser's state stays."""

    def apply(model: Transformer) -> Follows:
        set_mask(model, layers, share)
        return dict

    return apply


def _settles(model: Transformer) -> Follows:
    """The end of learning how layers are made: from here on they are weights of their own."""
    settle(model)
    return _without_layers


def _without_layers(moments: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The optimiser's state of all but the layers, whose weights are about to be others."""
    return {name: one for name, one in moments.items() if not LAYER.match(name.partition(".")[2])}


def _nothing(moments: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An optimiser's state that begins at zero; its count of steps goes on."""
    return {"steps": moments["steps"]}
