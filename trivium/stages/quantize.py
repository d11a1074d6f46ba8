"""Quantisation: the same model in 8 or 4 bits, and what that costs on text it has not seen."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field

from trivium.data.door import Door
from trivium.data.rows import PackedSequence, collate
from trivium.data.settings import Mixture
from trivium.kit.errors import TriviumError
from trivium.kit.numbers import Count
from trivium.learn.validation import groups_of, measure
from trivium.model.attention import Documents
from trivium.model.lora import adaptable
from trivium.model.quantize import Scheme, bytes_in_file, quantise
from trivium.model.transformer import Transformer
from trivium.stages.parts.documents import MEASURED, mixture_references
from trivium.stages.parts.model_folders import ModelFolder, folder_of, write_model
from trivium.stages.parts.shapes import planned_size
from trivium.stages.parts.stage import Product, Reference, Stage, Work


class Quantize(Stage):
    """Round a model's matrices and measure it before and after."""

    kind: Literal["quantize"]
    """Quantise a model."""
    version: ClassVar[int] = 2
    produces: ClassVar[Product] = "model"
    unaffecting: ClassVar[frozenset[str]] = frozenset({"seed"})

    start: str = Field(alias="from")
    """The model."""
    scheme: Scheme = "int8"
    """`int8` and `int4` round weights alone, `int8-dynamic` activations as well."""
    data: Mixture
    """The loss is measured on the held-out part of these."""
    context: Count = Field(default=512, ge=2)
    """The length of the sequences that the loss is measured on."""
    validation_tokens: Count = 32768
    """On how many tokens it is measured."""

    def references(self) -> list[Reference]:
        return [
            Reference("from", self.start, ("model",)),
            *mixture_references(self.data, by_length=True, without=MEASURED),
        ]

    def plan(self, inputs: Mapping[str, Path | Mapping[str, Any]]) -> dict[str, Any]:
        return planned_size(inputs.get(self.start))

    def run(self, work: Work) -> dict[str, Any]:
        """Measure, round, save, load what was saved, and measure that."""
        start = folder_of(work, self.start)
        tokenizer, model = start.tokenizer, start.load()
        context = min(self.context, model.config.context)
        validation = Door(work, tokenizer).validation_rows(self.data, context, self.validation_tokens)
        rows = [row for found in validation.values() for row in found]
        if not rows:
            raise TriviumError(f"{work.stage}: `data` has no held-out part; give a source `validation: 0.1`.")
        before, size = measured(model, rows), stored_bytes(model)
        quantise(model, self.scheme)
        write_model(work, model, tokenizer)
        after = measured(ModelFolder(work.output("model")).load(), rows)
        for name in before:
            work.change(name.replace("_", " "), round(before[name], 4), round(after[name], 4))
        return {
            "scheme": self.scheme,
            "tokens": sum(len(row) for row in rows),
            **{f"{name}_before": value for name, value in before.items()},
            **{f"{name}_after": value for name, value in after.items()},
            "accuracy_lost": before["accuracy"] - after["accuracy"],
            "bits_per_byte_lost": after["bits_per_byte"] - before["bits_per_byte"],
            "matrices_bytes_before": size,
            "matrices_bytes_after": stored_bytes(model),
        }


@torch.no_grad()
def measured(model: Transformer, rows: Sequence[PackedSequence]) -> dict[str, float]:
    """Bits per byte, and how often the likeliest next token is the one that comes."""
    right = tokens = 0
    for group in groups_of(rows, 4096):
        batch = collate(group, model.device)
        hidden = model(batch.tokens, Documents(batch.lengths, batch.tokens.device))
        asked = batch.targets >= 0
        # A few rows at a time: the scores of all tokens at once may not fit.
        for states, targets in zip(hidden[asked].split(512), batch.targets[asked].split(512), strict=True):
            right += int((model.logits(states).argmax(-1) == targets).sum())
        tokens += int(asked.sum())
    return {"bits_per_byte": measure(model, rows).bits_per_byte, "accuracy": right / max(tokens, 1)}


def stored_bytes(model: Transformer) -> int:
    """How much of a file the matrices that are rounded take, before or after."""
    return sum(bytes_in_file(layer.weight) for layer in adaptable(model).values())
