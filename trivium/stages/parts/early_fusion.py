"""Early fusion: a codebook learnt from the pictures of a stage's data, as tokens of the vocabulary."""

import base64
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from trivium.data.door import documents, is_corpus
from trivium.data.settings import MixtureSource
from trivium.kit.errors import TriviumError
from trivium.kit.files import read_object, write_json
from trivium.kit.processes import barrier, world
from trivium.model.config import ModelConfig
from trivium.model.transformer import Transformer
from trivium.model.vocabulary import grow_vocabulary
from trivium.stages.parts.modalities import Pictures
from trivium.stages.parts.stage import Work
from trivium.tokens.adopt import with_codes
from trivium.tokens.codebook import MARKS, Codebook, learnt_codes, names_of
from trivium.tokens.forms import Forms
from trivium.tokens.parts import PICTURES, bytes_of, is_part
from trivium.tokens.pictures import PictureForm, opened_picture, picture_item
from trivium.tokens.tokenizer import Tokenizer

MOST_PICTURES = 2000
"""Of each source, the first so many pictures teach the codebook."""


def with_codebook(
    work: Work, tokenizer: Tokenizer, forms: Forms, wish: Pictures, data: Mapping[str, MixtureSource]
) -> Tokenizer:
    """The tokenizer with a code for every kind of patch in the pictures of the data.

    One process learns the codebook and writes it into the stage's folder, where a resumed stage finds it.
    """
    assert forms.picture is not None
    place = work.folder / "codebook.json"
    if not place.is_file() and world().leads:
        found = list(_pictures(work, data, forms.picture))
        if not found:
            raise TriviumError(f"{work.stage}: the data holds no picture, so there is no codebook to learn.")
        codes = learnt_codes(np.stack(found), wish.codes, wish.patch, work.seed)
        write_json(place, {"pixels": base64.b64encode(codes.tobytes()).decode(), "codes": len(codes)})
    barrier()
    learnt = read_object(place)
    work.change("codes of pictures", 0, learnt["codes"])
    tokenizer = with_codes(tokenizer, learnt["codes"])
    first = tokenizer.token_id(names_of(1)[-1])
    assert first is not None, "just added"
    return tokenizer.with_forms(replace(forms, codebook=Codebook(wish.patch, first, learnt["pixels"])))


def grow_codes(model: Transformer, folder: Path, tokenizer: Tokenizer, seed: int) -> None:
    """Give the model that lies in a folder rows for the codes that its tokenizer gained."""
    # Random ones, as the names of the codes say nothing about them.
    grow_vocabulary(model, Tokenizer.load(folder), tokenizer, start="random", seed=seed)


def with_planned_codes(config: ModelConfig, wish: Pictures) -> ModelConfig:
    """The model as it will be if the pictures have as many different patches as there may be codes."""
    return config.changed(vocabulary=config.vocabulary + wish.codes + MARKS)


def _pictures(work: Work, data: Mapping[str, MixtureSource], form: PictureForm) -> Iterator[np.ndarray]:
    """The first pictures of every source, uint8 [side, side, 3]; the damaged are named later."""
    for source in data.values():
        if is_corpus(work, source):
            continue
        parts = (part for one in documents(work, [source]) for part in _parts(one.fields))
        for part in islice(parts, MOST_PICTURES):
            try:
                yield picture_item(opened_picture(*bytes_of(part)), form).data[0]
            except TriviumError:
                continue


def _parts(value: Any) -> Iterator[Mapping[str, Any]]:
    """The pictures in a row's fields."""
    if is_part(value):
        if value["type"] in PICTURES:
            yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _parts(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _parts(inner)
