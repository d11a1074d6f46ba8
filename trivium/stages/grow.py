"""Growing: a larger model that starts as the function of a small one, so that its training is not lost."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator

from trivium.kit.errors import TriviumError
from trivium.kit.files import load_tensors, read_object, save_tensors, write_json
from trivium.kit.seals import compared
from trivium.model.flops import parameter_count
from trivium.model.growth import (
    TOLERANCE,
    Grown,
    GrowthSettings,
    grown_config,
    grown_model,
    largest_difference,
    probe,
)
from trivium.model.modalities.folder import refuse_modalities
from trivium.model.quantize import quantised_as
from trivium.stages.parts.inheritance import NEW_LAYERS
from trivium.stages.parts.model_folders import folder_of, write_model
from trivium.stages.parts.shapes import planned_shape, shape_of, size_of
from trivium.stages.parts.stage import HANDOVER, MOMENTS, Product, Reference, Stage, Work


class Grow(GrowthSettings, Stage):
    """Make a model deeper, wider or a mixture of experts, keeping its function where the method can."""

    kind: Literal["grow"]
    """Make a model larger."""
    version: ClassVar[int] = 1
    produces: ClassVar[Product] = "model"

    start: str = Field(alias="from")
    """The model to grow."""
    exact: bool = True
    """Refuse a result whose logits moved by more than 0.0001 although the method keeps the function."""
    optimiser_state: Literal["keep", "reset"] = "keep"
    """Whether the parent's optimiser state grows along, for a next stage that keeps it."""

    @model_validator(mode="after")
    def _has_steps(self) -> Self:
        if self.method in ("masked", "learned"):
            raise ValueError(
                f"`{self.method}` takes steps of training: write `grow: [{{at: 50%, layers: 8, method: "
                f"{self.method}}}]` in a pretrain or midtrain stage"
            )
        return self

    def references(self) -> list[Reference]:
        return [Reference("from", self.start, ("model",))]

    def plan(self, inputs: Mapping[str, Path | Mapping[str, Any]]) -> dict[str, Any]:
        config = planned_shape(inputs.get(self.start))
        if config is None:
            return {}
        larger = grown_config(config, self)
        return {**size_of(larger), "layers": larger.layers, "width": larger.width, "model": shape_of(larger)}

    def run(self, work: Work) -> dict[str, Any]:
        """Grow, compare both models' logits, and leave a Hugging Face folder with the optimiser's state."""
        start = folder_of(work, self.start)
        tokenizer = start.tokenizer
        # Divided and rescaled weights are rounded again: in half precision the function would move.
        divided = self.widens or self.experts is not None
        model = start.load(torch.float32 if divided else None)
        refuse_modalities(model, work.stage, "grow")
        held = quantised_as(model)
        if held is not None:
            raise TriviumError(
                f"{work.stage}: the model is quantised to {held}; grow the one it was made from."
            )
        larger, grown = grown_model(model, self, seed=work.seed)
        for name in ("layers", "width", "heads", "key_value_heads", "inner_width", "family"):
            before, after = getattr(model.config, name), getattr(larger.config, name)
            if before != after:
                work.change(name.replace("_", "-"), before, after)
        sizes = parameter_count(model.config), parameter_count(larger.config)
        work.change("parameters", *sizes)
        context = min(model.config.reach, larger.config.reach)
        texts = [*probe(tokenizer.vocabulary_size, context), tokenizer.encode(PROBE)[:context]]
        moved = largest_difference(model, larger, texts)
        work.change("largest difference of logits", 0.0, moved)
        if self.keeps_function and self.exact and moved > TOLERANCE:
            raise TriviumError(
                f"{work.stage}: growing moved the logits by {moved:.2g}, more than {TOLERANCE}; this model's "
                "weights are too large to be divided exactly. Say `exact: false` to go on all the same."
            )
        if not self.keeps_function:
            work.say(f"this way of growing does not keep the function: logits moved by {moved:.3g}")
        self._hand_over(work, start.path, grown)
        write_model(work, larger, tokenizer)
        return {
            "parameters": sizes[1],
            "parameters_before": sizes[0],
            "keeps_function": self.keeps_function,
            "largest_difference": moved,
            "new_layers": list(grown.new_layers),
        }

    def _hand_over(self, work: Work, folder: Path, grown: Grown) -> None:
        """Leave what the next stage may take over: the grown optimiser state, rates, and what was read."""
        write_json(work.folder / NEW_LAYERS, list(grown.new_layers))
        state, left = folder.parent / MOMENTS, folder.parent / HANDOVER
        if not state.is_file() or not left.is_file():
            work.change("optimiser state", "none", "none")
            return
        write_json(work.folder / HANDOVER, read_object(compared(left)))
        if self.optimiser_state == "reset":
            work.change("optimiser state", "the parent's", "reset")
            return
        moments = grown.moments(load_tensors(compared(state)))
        save_tensors(work.folder / MOMENTS, moments)
        kept = sum(name.startswith("first.") for name in moments)
        work.change(
            "optimiser state", "the parent's", f"grown along for {kept} parameters, zero for new ones"
        )


PROBE = """The river rises in the hills and reaches the sea after three days. 12 + 30 = 42.
def mean(values):
    return sum(values) / len(values)
Der Fluss entspringt im Gebirge. 川は山から海へ流れる。
"""
"""Text on which both models are compared, whatever their vocabulary."""
