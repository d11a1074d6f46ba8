"""Steps that ask a model: prompt templates in jinja, how answers are drawn, and what becomes of failures."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, ClassVar

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment
from pydantic import Field, field_validator

from trivium.generate.asking.writers import ChatRequest
from trivium.generate.endpoint import ChatReply, EndpointSettings
from trivium.generate.sampling import Sampling
from trivium.generate.search.settings import SearchSettings
from trivium.kit.errors import TriviumError
from trivium.kit.fingerprint import fingerprint
from trivium.kit.numbers import Count
from trivium.synthesize.row import Messages, Row
from trivium.synthesize.step import Room, Step


@lru_cache(256)
def compiled(source: str) -> jinja2.Template:
    """A template, in a sandbox, that refuses columns which are not there."""
    environment = ImmutableSandboxedEnvironment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(source)


def rendered(source: str, columns: Mapping[str, Any], step: str, where: str = "") -> str:
    """A template filled with a row's columns."""
    try:
        return compiled(source).render(**columns)
    except jinja2.UndefinedError as error:
        there = ", ".join(sorted(columns)) or "none"
        raise TriviumError(
            f"`{step}`: the template of {where or 'a row'} asks for a column that it has not "
            f"({error.message}); "
            f"it has {there}."
        ) from None
    except (jinja2.TemplateError, TypeError, ValueError) as error:
        raise TriviumError(f"`{step}`: the template cannot be filled: {error}; fix it.") from None


@dataclass(frozen=True)
class Wanted:
    """One answer that a step wants: for which row, with which further columns, as which sample."""

    row: Row
    columns: Mapping[str, Any] = field(default_factory=dict)
    sample: int = 0
    messages: Messages | None = None
    """The conversation itself, where no template makes it."""
    search: SearchSettings | None = None
    """How the answer is searched for."""


class PromptedStep(Step):
    """A step that asks a model to write something."""

    asks: ClassVar[bool] = True

    template: str = ""
    """The prompt as a jinja template over the row's columns."""
    system: str | None = None
    """The system prompt, a template as well."""
    temperature: float = Field(default=1.0, ge=0)
    """The sampling temperature; 0 is greedy."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Sample from the likeliest tokens that have this probability together."""
    max_new_tokens: Count = Field(default=512, ge=1)
    """The longest answer in tokens."""
    stop: list[str] = []
    """Texts that end an answer."""
    cut: bool = False
    """Keep answers that were cut off at `max_new_tokens`; else they are dropped."""
    model: str | None = None
    """Another model that answers this step: a stage, a folder or an id on the hub."""
    endpoint: EndpointSettings | None = None
    """Another endpoint that answers this step."""

    @field_validator("template", "system")
    @classmethod
    def _is_template(cls, source: str | None) -> str | None:
        try:
            compiled(source or "")
        except jinja2.TemplateError as error:
            raise ValueError(f"the template cannot be read: {error}") from None
        return source

    def mentions(self) -> list[tuple[str, str, tuple[str, ...]]]:
        return [("model", self.model, ("model",))] if self.model is not None else []

    def sampling(self, seed: int, schema: Mapping[str, Any] | None = None) -> Sampling:
        """How an answer is drawn."""
        return Sampling(
            temperature=self.temperature, top_p=self.top_p, max_new_tokens=self.max_new_tokens,
            stop=tuple(self.stop), seed=seed, json_schema=schema,
        )  # fmt: skip

    def replies(
        self, wanted: Sequence[Wanted], room: Room, schema: Mapping[str, Any] | None = None
    ) -> list[ChatReply]:
        """The replies, in order; a reply that cannot be used says why as its `failure`."""
        requests = [self._request(one, room, schema) for one in wanted]
        return [self._usable(reply) for reply in room.ask(requests)]

    def _request(self, one: Wanted, room: Room, schema: Mapping[str, Any] | None) -> ChatRequest:
        columns = {**one.row.fields, **one.columns}
        messages = one.messages
        if messages is None:
            said = rendered(self.template, columns, self.name, one.row.id)
            messages = [{"role": "user", "content": said}]
        if self.system is not None and messages[0]["role"] != "system":
            said = rendered(self.system, columns, self.name, one.row.id)
            messages = [{"role": "system", "content": said}, *messages]
        # The seed follows from what is asked: the same question elsewhere is known, and questions that are
        # much alike are not answered with the same chance.
        draw = [room.seed, one.sample, one.row.fields.get("draw", 0), messages]
        seed = int(fingerprint(draw), 16) % 2**31
        return ChatRequest(tuple(messages), self.sampling(seed, schema), one.search)

    def _usable(self, reply: ChatReply) -> ChatReply:
        if reply.failure is not None:
            return reply
        why = None
        if reply.finish_reason == "length" and not self.cut:
            why = f"cut off: at {self.max_new_tokens} tokens"
        elif not reply.text.strip():
            why = "empty: the model said nothing"
        return reply if why is None else ChatReply(reply.text, reply.finish_reason, 0, 0, why)

    def source(self, room: Room, **facts: Any) -> dict[str, Any]:
        """What the provenance says of whatever this step's model wrote."""
        return {"model": room.teacher().name, "temperature": self.temperature, **facts}


def ways_of_writing(
    count: int, styles: Sequence[str], languages: Sequence[str], chance: random.Random
) -> list[dict[str, str]]:
    """So many pairs of a style and a language, each once before any comes again."""
    pairs = [{"style": style, "language": one} for style in styles or [""] for one in languages or [""]]
    chance.shuffle(pairs)
    return [pairs[place % len(pairs)] for place in range(count)]
