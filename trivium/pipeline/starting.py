"""`trivium init`: a recipe from a template, filled in for the data it is pointed at."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trivium.data.preference_forms import recognised_form
from trivium.data.sources import Source, read_documents
from trivium.kit.errors import TriviumError, nearest
from trivium.kit.files import expanded, write_text
from trivium.kit.numbers import short
from trivium.model.folder import load_config
from trivium.model.named import find_stage, model_of
from trivium.model.preset import preset
from trivium.pipeline.looking import Looked, lengths, look
from trivium.pipeline.preview import form_of
from trivium.tokens.tokenizer import Tokenizer

TEMPLATES = Path(__file__).parent.parent / "recipe" / "templates"
STARTER = TEMPLATES.parent / "starter.yaml"
MODEL = "HuggingFaceTB/SmolLM2-135M"
PLACES = {
    "pretrain": "./texts", "midtrain": "./texts", "sft": "./chats.jsonl", "lora": "./chats.jsonl",
    "dpo": "./pairs.jsonl", "rlvr": "./problems.jsonl", "full-road": "./texts", "long-context": "./texts",
    "new-language": "./texts", "serve": "./texts",
}  # fmt: skip
"""Where a template looks for data when none is named."""
WANTED = {
    "pretrain": "text", "midtrain": "text", "full-road": "text", "long-context": "text",
    "new-language": "text", "serve": "text", "sft": "examples", "lora": "examples",
    "dpo": "preferences", "rlvr": "problems",
}  # fmt: skip
EPOCHS = 4
"""How often texts can come round in pre-training before they teach less than new ones would."""


def templates() -> list[str]:
    """The names of the templates."""
    return sorted(path.stem for path in TEMPLATES.glob("*.yaml"))


@dataclass(frozen=True)
class Found:
    """What a template is filled in for."""

    looked: Looked
    counts: np.ndarray

    @property
    def tokens(self) -> float:
        """About how many tokens there are."""
        return (self.looked.documents or len(self.looked.rows)) * float(self.counts.mean())

    @property
    def validation(self) -> float:
        """A share that holds out at least a document, and about twenty of many."""
        documents = self.looked.documents or len(self.looked.rows)
        share = min(0.5, max(0.01, round(20 / max(1, documents), 3)))
        while self.looked.held_out(share) == 0 and share < 0.5:
            share = min(0.5, round(share * 1.5, 3))
        return share


def filled(
    template: str, path: Path, data: str | None, model: str | None, runs: str, chats: str | None
) -> str:
    """The text of a recipe for `path`, whose numbers suit the data."""
    if template not in templates():
        raise TriviumError(
            f"There is no template `{template}`{nearest(template, templates())} (there are "
            f"{', '.join(templates())})."
        )
    place = data or PLACES[template]
    source = Source(path=_seen_from_here(place), limit=2000 if place.startswith("world:") else None)
    if data is None and not expanded(place).exists():
        raise TriviumError(
            f"The template {template} needs data to look at: name it with --data, such as {place}."
        )
    looked = look(source)
    if not looked.rows:
        raise TriviumError(f"{place} holds no document; name a file with rows in it.")
    _check_form(template, looked, place)
    context, tokenizer = _of_model(model, runs) if model is not None else (None, None)
    found = Found(looked, lengths(looked, tokenizer, 4096))
    text = (TEMPLATES / f"{template}.yaml").read_text(encoding="utf-8")
    values = _values(template, found, path, place, model or MODEL, runs, context)
    values["chats"] = _yaml(_relative(chats or "./chats.jsonl", path))
    for name, value in values.items():
        text = text.replace(f"@{name}@", str(value))
    return text


def _check_form(template: str, looked: Looked, place: str) -> None:
    row, wanted = looked.rows[0], WANTED[template]
    form, learners = form_of(row)
    fits = {
        "text": row.text is not None,
        "examples": "sft" in learners,
        "preferences": _is_preference(row.fields),
        "problems": any(row.fields.get(name) for name in ("prompt", "question", "problem", "messages")),
    }[wanted]
    if not fits:
        raise TriviumError(
            f"{place} holds {form} (columns: {', '.join(looked.columns)}), and {template} needs {wanted}; "
            f"such rows are learned from by: {learners}."
        )


def _is_preference(fields: dict[str, Any]) -> bool:
    try:
        recognised_form(fields)
    except TriviumError:
        return False
    return True


def _of_model(model: str, runs: str) -> tuple[int | None, Tokenizer | None]:
    """How much a model reads, and its tokenizer, where it lies on this machine."""
    stage = find_stage(model, runs)
    folder = model_of(stage, model) if stage is not None else expanded(model)
    if not (folder / "config.json").is_file():
        return None, None
    return load_config(folder).context, Tokenizer.load(folder)


def _values(
    template: str, found: Found, path: Path, place: str, model: str, runs: str, reach: int | None
) -> dict[str, Any]:
    looked, counts = found.looked, found.counts
    rows = looked.documents or len(looked.rows)
    depth, vocabulary = _sized(found.tokens)
    budget = min(preset(depth, vocabulary).values["token_budget"], int(EPOCHS * found.tokens))
    longest = int(counts.max())
    context = min(reach or 1024, max(64, 1 << int(np.ceil(np.log2(max(2, np.percentile(counts, 99)))))), 1024)
    stage = find_stage(model, runs)
    # The link of a recipe says what the model is; the entry of the store behind it only which.
    link = Path(runs) / model
    named = model if stage is None else str(link if link.exists() else stage)
    new = 1 << int(np.ceil(np.log2(max(32, np.percentile(counts, 90)))))
    return {
        "name": path.stem,
        "found": f"{rows:,} documents of {place} ({form_of(looked.rows[0])[0]})",
        "data": _yaml(_relative(place, path)),
        "model": _yaml(_relative(named, path)),
        "rows": f"{rows:,}",
        "validation": f"{found.validation:g}",
        "vocabulary": vocabulary,
        "depth": depth,
        "tokens": short(max(1000, budget)),
        "available": short(found.tokens),
        "epochs": f"about {budget / max(1.0, found.tokens):.1f} times",
        "passes": 3 if rows < 1000 else 2 if rows < 10_000 else 1,
        "context": context,
        "longest": f"{longest:,}",
        "length": max(2 * (reach or 1024), 1 << int(np.ceil(np.log2(max(2, longest))))),
        "loss": "kto" if "label" in looked.columns else "dpo",
        "pairs": max(1, min(32, rows // 10)),
        "steps": max(10, min(200, rows // 4)),
        "prompts": max(1, min(16, rows // 10)),
        "new": min(512, new, (reach or 1024) // 2),
    }


def _sized(tokens: float) -> tuple[int, int]:
    """A depth and a vocabulary that so many tokens of text can fill."""
    for depth, vocabulary, needed in ((8, 16384, 1e9), (6, 8192, 1e8), (4, 4096, 1e7), (3, 2048, 1e6)):
        if tokens >= needed:
            return depth, vocabulary
    return 2, 512 if tokens < 1e5 else 1024


def _relative(place: str, path: Path) -> str:
    """A place as the recipe's file names it."""
    here = expanded(place)
    if place.startswith("world:") or not (here.exists() or place.startswith((".", "/", "~"))):
        return place
    seen = os.path.relpath(here, path.parent)
    return seen if seen.startswith(("..", "/")) else f"./{seen}"


def _yaml(text: str) -> str:
    """A text as a YAML word, quoted where that is needed."""
    plain = text.replace("/", "").replace(".", "").replace("-", "").replace("_", "")
    return text if plain.isalnum() else json.dumps(text)


def _seen_from_here(place: str) -> str:
    return place if place.startswith("world:") else str(expanded(place))


def with_examples(folder: Path) -> list[Path]:
    """Write `texts/` and `chats.jsonl` of the invented world, on which the starter recipe runs."""
    texts, chats = folder / "texts", folder / "chats.jsonl"
    for place in (texts, chats):
        if place.exists():
            raise TriviumError(f"{place} is there already; move it away, or leave --example out.")
    texts.mkdir(parents=True)
    for name, count in (("prose", 600), ("facts", 1200), ("sums", 300)):
        found = read_documents(Source(path=f"world:{name}", limit=count))
        lines = [json.dumps({"text": one.text}, ensure_ascii=False) for one in found]
        write_text(texts / f"{name}.jsonl", "\n".join(lines) + "\n")
    found = read_documents(Source(path="world:chat", limit=600))
    rows = [json.dumps({"messages": one.fields["messages"]}, ensure_ascii=False) for one in found]
    write_text(chats, "\n".join(rows) + "\n")
    return [texts, chats]
