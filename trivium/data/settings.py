"""How a person names data: a list of sources, or a mixture of sources that have weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, TypeAdapter, model_validator
from pydantic.json_schema import SkipJsonSchema

from trivium.data.ingredients import Lengths
from trivium.data.sources import Source
from trivium.kit.errors import TriviumError
from trivium.kit.numbers import Count, Number


def _listed(value: Any) -> Any:
    """`./texts` and `{path: ./texts, limit: 10}` are short for lists of one.

    So is `{./texts: {limit: 10}}`, as a mixture names its sources, each with what is said of it.
    """
    if isinstance(value, Mapping) and all(isinstance(said, Mapping | None) for said in value.values()):
        value = [{**(said or {}), "path": place} for place, said in value.items()]
    places = value if isinstance(value, list) else [value]
    return [{"path": place} if isinstance(place, str) else place for place in places]


Sources = Annotated[
    list[Source],
    Field(min_length=1),
    BeforeValidator(_listed, json_schema_input_type=str | Source | list[str | Source] | dict[str, Any]),
]

Weight = Annotated[Number, Field(ge=0)]


class MixtureSource(Source):
    """One source of a mixture; how it is read matters only where it is not a corpus yet."""

    path: SkipJsonSchema[str] = Field(default="", exclude=True)
    """Where it is: `of`, or the name it has in the mixture."""
    weight: Weight | list[Weight | tuple[Number, Weight]] | None = None
    """Share of the tokens: a number, `[start, end]`, or points `[[progress, weight], ...]`."""
    max_repeats: float | None = Field(default=None, gt=0)
    """How often the source may be repeated before the stage is refused."""
    easy_first: str | None = None
    """Sample rows at random, then sort them by the mean of this column, lowest first, in every epoch."""
    of: str | None = None
    """The source, where a mixture names one twice; else it is the name in the mixture."""
    min_tokens: Count | None = None
    """Only documents of at least so many tokens take part, and with `max_tokens` of at most so many."""
    max_tokens: Count | None = None
    """Only documents of at most so many tokens take part."""
    validation: float = Field(default=0.01, ge=0, lt=1)
    """The share of documents held out for validation."""

    @property
    def within(self) -> Lengths:
        """The fewest and the most tokens of the documents that take part."""
        return self.min_tokens or 0, self.max_tokens

    @model_validator(mode="after")
    def some_length_fits(self) -> MixtureSource:
        if self.max_tokens is not None and self.max_tokens < max(2, self.min_tokens or 0):
            raise ValueError(f"no document has as few as `max_tokens` {self.max_tokens}; raise it")
        return self


def _named(value: Any) -> Any:
    """`corpus`, and `[corpus, ./texts]`, are short for a mapping without further wishes."""
    if isinstance(value, str) or (isinstance(value, Mapping) and isinstance(value.get("path"), str)):
        value = [value]
    if isinstance(value, list) and all(isinstance(one, (str, Mapping)) for one in value):
        value = dict(map(_place, value))
    return {name: _at(name, one) for name, one in value.items()} if isinstance(value, Mapping) else value


def _place(place: str | Mapping[str, Any]) -> tuple[str, Any]:
    """A place of a list and what is said of it, as in `{path: ./texts, limit: 10}`."""
    if isinstance(place, str):
        return place, {}
    if not isinstance(place.get("path"), str):
        raise ValueError("a place in a list of `data` is a text, or a mapping with a `path`")
    return place["path"], {key: value for key, value in place.items() if key != "path"}


def _at(name: str, source: Any) -> Any:
    """What is said of a source, with the place that its name in the mixture stands for."""
    if isinstance(source, MixtureSource):
        return source.model_copy(update={"path": source.of or name})
    if source is not None and not isinstance(source, Mapping):
        return source
    if source and "path" in source:
        raise ValueError(f"`{name}` has a `path`, but the name is the path; say `of` where it is another one")
    return {**(source or {}), "path": (source or {}).get("of") or name}


Mixture = Annotated[
    dict[str, MixtureSource],
    Field(min_length=1),
    BeforeValidator(
        _named, json_schema_input_type=str | list[str | dict[str, Any]] | dict[str, MixtureSource]
    ),
]


def mixture_of(written: Mapping[str, Any]) -> dict[str, MixtureSource]:
    """A mixture from what a finished stage keeps of it, which may name nothing."""
    return TypeAdapter(Mixture).validate_python(written) if written else {}


def read_alike(stage: str, mixture: Mapping[str, MixtureSource]) -> None:
    """Refuse two entries for one source that would have it read or held out differently."""
    first: dict[str, tuple[str, dict[str, Any]]] = {}
    for name, source in mixture.items():
        wishes = source.model_dump(include={*Source.model_fields, "validation"})
        other, before = first.setdefault(source.path, (name, wishes))
        for key in wishes:
            if wishes[key] != before[key]:
                raise TriviumError(
                    f"{stage}: `{other}` and `{name}` read `{source.path}` with another `{key}`."
                )


def all_weighted_or_none(stage: str, mixture: Mapping[str, MixtureSource]) -> None:
    """Refuse a mixture in which some sources have a weight and others none."""
    weighted = [source.weight is not None for source in mixture.values()]
    if any(weighted) and not all(weighted):
        missing = list(mixture)[weighted.index(False)]
        raise TriviumError(f"{stage}: `{missing}` has no `weight` and other sources have one; give it one.")
