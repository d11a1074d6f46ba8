"""Language: which one a text is written in, and only those that are wanted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import ClassVar

import pyarrow as arrow
from pydantic import Field

from trivium.curate.batch import Batch, Outcome
from trivium.curate.step import Step
from trivium.kit.errors import TriviumError, needing
from trivium.kit.files import expanded

Identify = Callable[[str], tuple[str, float]]
CHINESE = ("yue", "wuu", "cmn")
"""What classifiers call written Chinese, too; it is `zh` where that is wanted and these are not."""


class Language(Step):
    """Keep texts in these languages; the language and how sure the classifier is stay with every document."""

    name: ClassVar[str] = "language"
    short: ClassVar[str] = "keep"

    keep: list[str] = Field(default=[], description="the languages kept, as ISO 639 codes; all if empty")
    least: float = Field(default=0.0, ge=0, le=1)
    """How sure the classifier has to be."""
    characters: int = Field(default=1000, ge=20)
    """How much of a text is read."""
    model: str | None = None
    """A fastText model (lid.176, GlotLID) in place of py3langid."""

    def columns(self) -> dict[str, arrow.DataType]:
        return {"language": arrow.string(), "language_score": arrow.float32()}

    def mentions(self) -> list[tuple[str, str, tuple[str, ...]]]:
        return [] if self.model is None else [("model", self.model, ("source",))]

    def locate(self, where: Mapping[str, Path]) -> None:
        if self.model is not None:
            self.model = str(where[self.model])

    def check(self) -> None:
        identify = _identifier(self.model)
        identify("one sentence")
        unknown = set(self.keep) - _languages() if self.model is None else set()
        if unknown:
            raise TriviumError(
                f"`language`: py3langid does not know {', '.join(sorted(unknown))}; write ISO 639 codes "
                "such as en, de, fr, or name a fastText `model`."
            )

    def run(self, batch: Batch) -> Outcome:
        identify = _identifier(self.model)
        found = [self._named(*identify(text[: self.characters])) for text in batch.texts]
        reasons = [self._reason(*one) for one in found]
        columns = {
            "language": arrow.array([language for language, _ in found], arrow.string()),
            "language_score": arrow.array([score for _, score in found], arrow.float32()),
        }
        return Outcome(reasons, columns=columns)

    def _named(self, language: str, score: float) -> tuple[str, float]:
        chinese = language in CHINESE and language not in self.keep and "zh" in self.keep
        return "zh" if chinese else language, score

    def _reason(self, language: str, score: float) -> str | None:
        if self.keep and language not in self.keep:
            return f"language {language}: score {score:.2f}, wanted {', '.join(self.keep)}"
        if score < self.least:
            return f"unsure: {language} with score {score:.2f}, at least {self.least:g}"
        return None


@lru_cache(2)
def _identifier(model: str | None) -> Identify:
    if model is None:
        found = _langid()
        return lambda text: (lambda one: (one[0], min(float(one[1]), 1.0)))(found.classify(text))
    with needing("`language: {model: ...}` reads a fastText model: pip install fasttext-numpy2-wheel."):
        import fasttext
    try:
        loaded = fasttext.load_model(str(expanded(model)))
    except ValueError as error:
        raise TriviumError(f"`language`: {model} is no fastText model ({error}); check the path.") from error

    def identify(text: str) -> tuple[str, float]:
        labels, scores = loaded.predict(text.replace("\n", " "))
        code = labels[0].removeprefix("__label__").partition("_")[0] if labels else "und"
        return code, min(float(scores[0]), 1.0) if len(scores) else 0.0

    return identify


@lru_cache(1)
def _langid():
    with needing("`language` needs py3langid: pip install 'trivium[curate]'."):
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def _languages() -> set[str]:
    return set(_langid().labels)
