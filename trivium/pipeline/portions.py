"""What a stage reads: of every source its tokens, its documents' lengths, and its share of the training."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal, TypeGuard

import numpy as np

from trivium.data.mixture import weights_over
from trivium.data.packing import pack
from trivium.data.settings import MixtureSource
from trivium.data.shards import Shards, in_validation, text_hash
from trivium.data.sources import Source
from trivium.kit.files import read_json
from trivium.model.attention import padded_length
from trivium.pipeline.checks import Checked
from trivium.pipeline.looking import NO_ITEMS, Items, Looked, item_share, learned_share, lengths
from trivium.pipeline.run import Run
from trivium.recipe.outside import locate
from trivium.stages.parts.inheritance import trains_on
from trivium.stages.parts.stage import Reference, Stage
from trivium.tokens.forms import Forms
from trivium.tokens.tokenizer import Tokenizer

SAMPLED = 4096
"""So many documents of a source stand for all of them when they are packed into rows."""

Role = Literal["data", "replay", "watch"]
Numbers = Mapping[str, Any]


@dataclass(frozen=True)
class Portion:
    """One source of a stage, as far as it is known before the stage reads it."""

    name: str
    tokens: float
    """To train on."""
    lengths: np.ndarray
    """Of some of its documents."""
    held: np.ndarray
    """The lengths of the documents that it holds out, or of as many like them."""
    learned: float | None = None
    """The share of its tokens that is learned; None for plain text, where every next token is."""
    weight: float | None = None
    """What it counts in the mixture, in the mean over the stage; None where its size decides."""
    role: Role = "data"
    items: Items = NO_ITEMS
    """The pictures and sounds in one of its tokens, in the mean."""

    @property
    def documents(self) -> int:
        """How many documents are trained on."""
        return max(1, round(self.tokens / max(1.0, float(self.lengths.mean()))))


@dataclass(frozen=True)
class Rows:
    """Documents packed into rows."""

    count: float
    """How many rows there are."""
    each: float
    """Tokens of a row."""
    squares: float
    """The keys that a row's tokens meet together, masked ones too."""
    learned: float
    """Tokens of a row whose successor is learned."""
    items: Items = NO_ITEMS
    """The pictures and sounds of a row."""


class Reader:
    """Finds the portions of a recipe's stages; a stage's tokenizer reads what is not tokenised yet."""

    def __init__(self, prepared: Run, checked: Checked, derived: Mapping[str, Numbers]) -> None:
        self.prepared, self.checked, self.derived = prepared, checked, derived

    def portions(
        self, name: str, tokenizer: Tokenizer | None, vocabulary: int, forms: Forms | None = None
    ) -> list[Portion]:
        """All sources that stage `name` learns from, sees again, or measures; `forms` says how its model
        takes pictures and sounds."""
        stage: Any = self.prepared.nodes[name].stage
        found: list[Portion] = []
        replay = getattr(stage, "replay", None)
        for role, sources in (
            ("data", getattr(stage, "data", None)),
            ("replay", getattr(replay, "data", None)),
            ("watch", getattr(stage, "watch", None)),
            ("watch", getattr(stage, "measure", None) if stage.kind == "anneals" else None),
        ):
            for written, said in self._named(name, sources).items():
                one = self._portion(name, written, said, tokenizer, vocabulary, forms)
                if one is not None:
                    found.append(replace(one, role=role))  # type: ignore[arg-type]
        starts = [stage.start] if replay is not None and replay.data is None else []
        if stage.kind == "merge" and stage.data is None:
            starts = list(stage.of)
        known = {one.name for one in found}
        for start in starts:
            behind = [
                one
                for one in self._behind(name, start, tokenizer, vocabulary, forms)
                if one.name not in known
            ]
            found += [replace(one, role="replay" if replay is not None else "data") for one in behind]
            known |= {one.name for one in behind}
        return found

    def _named(self, name: str, sources: Any) -> dict[str, MixtureSource | None]:
        """The sources of a setting; those of a corpus have neither weights nor a share held out."""
        if _is_mixture(sources):
            return dict(sources)
        if sources is None:
            return {}
        node = self.prepared.nodes[name]
        return dict.fromkeys((*self.checked.sources.get(name, {}), *node.parents))

    def _portion(
        self,
        name: str,
        written: str,
        said: MixtureSource | None,
        tokenizer: Tokenizer | None,
        vocabulary: int,
        forms: Forms | None,
    ) -> Portion | None:
        node = self.prepared.nodes[name]
        source = said.path if said is not None else written
        weight = None if said is None or said.weight is None else mean_weight(said.weight)
        if source in node.parents:
            made = self.derived.get(node.parents[source].stage, {})
            if "tokens to learn" not in made:
                return None
            return Portion(
                written, float(made["tokens to learn"]), made["lengths"], made["held lengths"], None, weight
            )
        looked = self._looked(name, source)
        if looked is None or not looked.documents:
            return None
        share = said.validation if said is not None else float(getattr(node.stage, "validation", 0.0))
        sizes = lengths(looked, tokenizer, vocabulary, forms)
        trained, held = _split(looked, sizes, share)
        left = looked.documents - (looked.held_out(share) or 0)
        learned = learned_share(looked, tokenizer) if trains_on(node.stage.kind) == "examples" else None
        tokens = left * float((trained if len(trained) else sizes).mean())
        items = item_share(looked, forms, sizes)
        return Portion(
            written, tokens, trained if len(trained) else sizes, held, learned, weight, items=items
        )

    def _looked(self, name: str, source: str) -> Looked | None:
        """The first rows of a source; those of a stage that is done already are looked at now."""
        found = self.checked.sources.get(name, {}).get(source)
        if found is not None or self.prepared.entry(name).state != "done":
            return found
        for reference in self.prepared.nodes[name].stage.references():
            if reference.name == source and reference.read is not None:
                place = located(self.prepared, reference)
                return None if place is None else self.checked.look(place)
        return None

    def _behind(
        self, name: str, start: str, tokenizer: Tokenizer | None, vocabulary: int, forms: Forms | None
    ) -> list[Portion]:
        """What the model that a stage starts from was trained on, with the share that each source had."""
        parent = self.prepared.nodes[name].parents.get(start)
        if parent is None:
            return []
        stage: Any = self.prepared.nodes[parent.stage].stage
        if stage.kind == "merge":
            return self._behind(parent.stage, stage.of[0], tokenizer, vocabulary, forms)
        if trains_on(stage.kind) is None:
            return []
        every = self.portions(parent.stage, tokenizer, vocabulary, forms)
        replay = getattr(getattr(stage, "replay", None), "share", 0.0) or 0.0
        return [replace(one, weight=share) for one, share in shares(every, replay) if share > 0]


def located(prepared: Run, reference: Reference) -> Source | None:
    """The source that a reference names, where it can be read now."""
    assert reference.read is not None
    if reference.name.startswith("world:"):
        return reference.read
    place = locate(reference.name, prepared.recipe.base)
    if place is None or (place.is_dir() and (place / "manifest.json").is_file()):
        return None
    return reference.read.model_copy(update={"path": str(place)})


def _split(looked: Looked, sizes: np.ndarray, share: float) -> tuple[np.ndarray, np.ndarray]:
    """The lengths of documents to train on, and of those held out: as many as will be, at most a sample."""
    held = looked.held_out(share) or 0 if share > 0 else 0
    if held and looked.whole and len(sizes) == len(looked.rows):
        out = np.array([in_validation(text_hash(row), share) for row in looked.rows])
        return sizes[~out], sizes[out]
    return sizes, np.resize(sizes, min(held, SAMPLED)) if held else sizes[:0]


def made_by(folder: Any) -> dict[str, Any]:
    """What a corpus that is there already has to learn from and holds out."""
    splits = read_json(folder / "manifest.json")["splits"]
    held = [Shards(folder, split, verify=False).lengths for split in splits if split != "train"]
    return {
        "tokens to learn": splits["train"]["tokens"],
        "held lengths": np.concatenate(held) if held else np.zeros(0, dtype=np.int64),
        "lengths": Shards(folder, verify=False).lengths,
    }


def mean_weight(written: Any) -> float:
    """The mean of a weight over the stage."""
    knots = weights_over(written)
    if len(knots) == 1:
        return knots[0][1]
    inside = sum((b - a) * (low + high) / 2 for (a, low), (b, high) in pairwise(knots))
    return inside + knots[0][0] * knots[0][1] + (1 - knots[-1][0]) * knots[-1][1]


def shares(portions: Sequence[Portion], replay: float) -> list[tuple[Portion, float]]:
    """What of the training each portion is; what is only measured has no share."""
    found: list[tuple[Portion, float]] = []
    again = any(one.role == "replay" for one in portions)
    for role, whole in (("data", 1 - replay if again else 1.0), ("replay", replay)):
        mine = [one for one in portions if one.role == role]
        weights = [one.tokens if one.weight is None else one.weight for one in mine]
        total = sum(weights)
        found += [(one, whole * weight / total if total else 0.0) for one, weight in zip(mine, weights)]
    return found


def packed(one: Portion, context: int, padded: bool, varied: bool) -> Rows:
    """The documents of a source in rows of `context` tokens."""
    sizes, documents, learned = one.lengths, one.documents, one.learned
    some = np.resize(sizes, min(documents, SAMPLED)) if documents > len(sizes) else sizes
    packing = pack(some, context)
    if not len(packing):
        return Rows(0.0, 0.0, 0.0, 0.0)
    count, tokens = len(packing), packing.tokens
    pieces = packing.ends - packing.starts
    each = tokens / count
    # Nothing follows the last token of a document; where one was cut, it goes on.
    ends = int((packing.ends == some[packing.documents]).sum())
    return Rows(
        count * max(1.0, documents / len(some)), each, attended(pieces, padded, varied=varied) * each,
        each * learned if learned is not None else (tokens - ends) / count, one.items * each,
    )  # fmt: skip


def attended(sizes: np.ndarray, padded: bool, *, varied: bool = False) -> float:
    """How many keys a token meets on average, in documents of these lengths.

    A processor's kernel computes documents of several lengths in groups, each padded to the group's; `varied`
    where others are computed with these."""
    sizes = np.asarray(sizes, dtype=np.float64)
    squares = sizes**2
    if padded and (varied or len(set(sizes.tolist())) > 1):
        squares = np.array([float(padded_length(int(one))) ** 2 for one in sizes])
    return float(squares.sum() / max(1.0, sizes.sum()))


def training_rows(
    portions: Sequence[Portion], replay: float, context: int, padded: bool
) -> tuple[Rows, float]:
    """A mean row of the training, of all rows there are, and how many tokens rows of all sources have.

    A source's share is one of the rows; how long `tokens` last, the rows of all sources together tell."""
    varied = len({int(size) for one in portions for size in np.minimum(one.lengths, context)}) > 1
    mixed = [(share, packed(one, context, padded, varied)) for one, share in shares(portions, replay)]
    count = sum(rows.count for _, rows in mixed)
    together = sum(rows.count * rows.each for _, rows in mixed) / max(1.0, count)
    mean = lambda part: sum(share * getattr(rows, part) for share, rows in mixed)
    items = sum((rows.items * share for share, rows in mixed), NO_ITEMS)
    return Rows(count, mean("each"), mean("squares"), mean("learned"), items), together


@dataclass(frozen=True)
class Measured:
    """What a loss is measured on once."""

    tokens: float
    attended: float
    """The keys that each token meets."""
    predicted: float
    """The tokens whose successor is scored."""
    attended_in_rows: float
    """The keys that each token meets where every row is read as one text."""


def measured(portions: Sequence[Portion], context: int, budget: float, padded: bool) -> Measured | None:
    """Of every source its part of the budget, in whole rows; None where nothing is held out."""
    pieces: list[np.ndarray] = []
    rows: list[np.ndarray] = []
    predicted = 0.0
    for one in portions:
        packing = pack(one.held, context) if len(one.held) else None
        if packing is None or not len(packing):
            continue
        sizes = packing.ends - packing.starts
        filled = np.cumsum(sizes)[packing.rows[1:] - 1]
        count = min(len(packing), int(np.searchsorted(filled, budget / len(portions))) + 1)
        last = packing.rows[count]
        ends = int((packing.ends == one.held[packing.documents])[:last].sum())
        tokens = float(filled[count - 1])
        predicted += tokens - ends if one.learned is None else tokens * one.learned
        pieces.append(sizes[:last])
        rows.append(np.diff(filled[:count], prepend=0))
    if not pieces:
        return None
    every, whole = np.concatenate(pieces), np.concatenate(rows)
    return Measured(float(every.sum()), attended(every, padded), predicted, attended(whole, padded))


def mixture_of(stage: Stage) -> dict[str, MixtureSource]:
    """The sources in `data` that have settings of their own."""
    data = getattr(stage, "data", None)
    return data if _is_mixture(data) else {}


def _is_mixture(sources: Any) -> TypeGuard[dict[str, MixtureSource]]:
    """Whether each of the sources has settings of its own."""
    return isinstance(sources, dict) and all(isinstance(one, MixtureSource) for one in sources.values())
