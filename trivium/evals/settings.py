"""How models are asked, and how a person names a task with its options."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, ValidationError

from trivium.generate.chat_fit import Reasoning
from trivium.generate.search.settings import SearchSettings
from trivium.kit import settings as kit
from trivium.kit.errors import TriviumError

Style = Literal["continue", "chat"]
TaskSpec = str | Mapping[str, Any]


def _by_method(value: Any) -> Any:
    """The name of a method alone is a search with its defaults."""
    return {"method": value} if isinstance(value, str) else value


Searched = Annotated[SearchSettings, BeforeValidator(_by_method, json_schema_input_type=str | SearchSettings)]


class Settings(kit.Settings):
    """What holds for every task unless its own options say otherwise."""

    model_config = ConfigDict(frozen=True)

    style: Literal["auto", "continue", "chat"] = "auto"
    """As text to continue or through the chat template; auto is the latter if the model ends its turns."""
    limit: int = Field(default=200, ge=1)
    """How many questions (or documents) a task asks at most."""
    shots: int = Field(default=0, ge=0, le=1000)
    """How many answered questions of the training split stand before each question."""
    chain_of_thought: bool = True
    """Whether a model may work a sum out; without, it has to state the result at once."""
    reasoning: Reasoning = "off"
    """Whether a model asked through its template is to think first; `open` begins the thought for it."""
    samples: int = Field(default=0, ge=0, le=100_000)
    """How many answers are drawn beside the likeliest one, for pass@k."""
    temperature: float = Field(default=0.8, gt=0)
    """The temperature of those samples."""
    max_new_tokens: int | None = Field(default=None, ge=1)
    """How long an answer may be; None leaves it to the task."""
    search: Searched | None = None
    """How answers are searched for, such as `{method: best_of, n: 8, scorer: prm}`; else none is."""
    seed: int = 0
    """Of the questions and of the samples."""


def settings_of(what: str, given: Mapping[str, Any]) -> Settings:
    """Settings from what a person wrote, or one sentence on what is wrong with it."""
    try:
        return Settings.model_validate(dict(given))
    except ValidationError as error:
        first = error.errors()[0]
        raise TriviumError(f"{what}: `{first['loc'][0]}`: {first['msg'].lower()}.") from None


def named(spec: TaskSpec) -> tuple[str, dict[str, Any]]:
    """The task a person named as `name?key=value&key=value` or in a mapping, and what else was written."""
    if isinstance(spec, str):
        name, _, words = spec.partition("?")
        pairs = (word.partition("=") for word in words.split("&") if word)
        return name.strip(), {key: value for key, _, value in pairs}
    given = dict(spec)
    name = str(given.pop("task", "")).strip()
    if not name:
        raise TriviumError(f"The task {dict(spec)} has no key `task` that names it.")
    return name, given


def read_spec(spec: TaskSpec, settings: Settings) -> tuple[str, str, Settings, dict[str, Any]]:
    """A task's label, its name, its settings and its own options."""
    name, options = named(spec)
    label = str(options.pop("name", spec if isinstance(spec, str) else name))
    own = {key: options.pop(key) for key in list(options) if key in Settings.model_fields}
    merged = settings_of(f"The task {name}", {**settings.model_dump(), **own})
    return label, name, merged, options
