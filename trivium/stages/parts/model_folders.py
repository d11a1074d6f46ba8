"""The folder of a finished model, opened to be measured, changed or asked; and a new one, written."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from trivium.generate.engine import Engine
from trivium.kit import machine
from trivium.kit.files import whole_folder
from trivium.model.config import ModelConfig
from trivium.model.folder import load_config, load_model, save_model
from trivium.model.hub import resolve
from trivium.model.transformer import Transformer
from trivium.stages.parts.stage import Work
from trivium.tokens.tokenizer import Tokenizer


@dataclass(frozen=True)
class ModelFolder:
    """A Hugging Face folder of a model with its tokenizer, of which each part is read once it is needed."""

    path: Path

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer beside the weights."""
        return Tokenizer.load(self.path)

    @cached_property
    def config(self) -> ModelConfig:
        """The model's shape."""
        return load_config(self.path)

    def load(self, dtype: torch.dtype | None = None) -> Transformer:
        """The model on this process's device, in the stored precision unless `dtype` says otherwise."""
        return load_model(self.path, dtype=dtype, device=machine.device())

    def engine(self, max_rows: int) -> Engine:
        """An engine over the model in float32."""
        return Engine(self.load(torch.float32), self.tokenizer, max_rows=max_rows)


def folder_of(work: Work, name: str) -> ModelFolder:
    """The model that a setting names: a stage's, a folder, or an id on the hub."""
    return ModelFolder(resolve(str(work.path(name))))


def write_model(work: Work, model: Transformer, tokenizer: Tokenizer) -> None:
    """Put the stage's model in place, with its tokenizer and the tokens that end a text."""
    generation = {"eos_token_id": sorted(tokenizer.stop_ids), "pad_token_id": tokenizer.pad_id}
    with whole_folder(work.output("model")) as folder:
        save_model(model, folder, generation=generation)
        tokenizer.save(folder)
