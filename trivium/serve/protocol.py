"""The bodies of requests: OpenAI's fields, our samplers, and nothing misspelt."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from trivium.generate.chat_fit import Overflow, Reasoning
from trivium.generate.sampling import (
    MAXIMUM_BIAS,
    MAXIMUM_REPETITION,
    MAXIMUM_TEMPERATURE,
    MINIMUM_REPETITION,
    MINIMUM_TEMPERATURE,
)
from trivium.generate.search.settings import SearchSettings
from trivium.serve.failures import RequestRefused

Probability = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Penalty = Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)]


def _not_too_cold(temperature: float) -> float:
    if 0 < temperature < MINIMUM_TEMPERATURE:
        raise ValueError(f"must be 0, which is greedy, or at least {MINIMUM_TEMPERATURE:g}")
    return temperature


Temperature = Annotated[
    float, Field(ge=0, le=MAXIMUM_TEMPERATURE, allow_inf_nan=False), AfterValidator(_not_too_cold)
]
Repetition = Annotated[float, Field(ge=MINIMUM_REPETITION, le=MAXIMUM_REPETITION, allow_inf_nan=False)]
Bias = Annotated[float, Field(ge=-MAXIMUM_BIAS, le=MAXIMUM_BIAS, allow_inf_nan=False)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]


def _first_of(most: int) -> Any:
    """A list that ends at its first wrong item; one of millions of wrong items would take minutes."""
    return Field(max_length=most, fail_fast=True)


def _short(most: int) -> BeforeValidator:
    """Refuse a list or an object of too many entries before any of them is looked at."""

    def check(value: Any) -> Any:
        if isinstance(value, list | dict) and len(value) > most:
            raise ValueError(f"has {len(value)} entries, at most {most} are read")
        return value

    return BeforeValidator(check)


def _texts_or_ids(value: Any) -> Any:
    """A text, texts, token ids or lists of these, told by types alone: a list may have a million items."""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        kinds = set(map(type, value))
        if not kinds or _are_ids(value, kinds):
            return value
        if len(value) > MOST_TEXTS and kinds in ({str}, {list}):
            raise ValueError(f"has {len(value)} entries, at most {MOST_TEXTS} are read")
        if kinds == {str} or (kinds == {list} and all(_are_ids(one, set(map(type, one))) for one in value)):
            return value
    raise ValueError("must be a text, a list of texts, a list of token ids or a list of such lists")


def _are_ids(value: list[Any], kinds: set[type]) -> bool:
    # type and not isinstance: true is no token
    return not value or (kinds == {int} and min(value) >= 0 and max(value) < 2**31)


# Far more than any server's limits let through, and few enough to be made in a fraction of a second.
MOST_TEXTS = 4096
MOST_BRACKETS = 200_000
Prompts = Annotated[Any, BeforeValidator(_texts_or_ids)]


class Body(BaseModel):
    """A JSON object whose types are taken at their word and whose unknown keys are refused."""

    model_config = ConfigDict(strict=True, extra="forbid", protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _of_few_fields(cls, value: Any) -> Any:
        if isinstance(value, dict) and len(value) > 2 * len(cls.model_fields):
            raise ValueError(f"has {len(value)} fields, and this server knows {len(cls.model_fields)} there")
        return value


class StreamOptions(Body):
    """What a stream tells besides its text."""

    include_usage: bool = False
    include_obfuscation: bool | None = None


class JsonSchema(Body):
    """A named schema the answer must satisfy."""

    name: str = "answer"
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    """The form the answer must have."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _schema_present(self) -> ResponseFormat:
        if self.type == "json_schema" and (self.json_schema is None or self.json_schema.schema_ is None):
            raise ValueError("type json_schema needs json_schema.schema")
        return self


class GenerationBody(Body):
    """What every request for generated text may say."""

    model: str
    temperature: Temperature | None = None
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    top_k: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    min_p: Probability | None = None
    typical_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    repetition_penalty: Repetition | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: Annotated[dict[str, Bias] | None, _short(1024)] = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    min_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    stop: str | Annotated[list[str], _first_of(4096)] | None = None
    stop_token_ids: Annotated[list[TokenId], _first_of(64)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    regex: Annotated[str, Field(min_length=1, max_length=4096)] | None = None

    # What other servers of this protocol take and this one has no use for.
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        """The strings that end the answer."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @model_validator(mode="after")
    def _one_constraint(self) -> GenerationBody:
        if (
            self.regex is not None
            and self.response_format is not None
            and self.response_format.type != "text"
        ):
            raise ValueError("regex and response_format cannot both shape the answer")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is only for stream: true")
        return self


class TextPart(Body):
    """One piece of a message's text."""

    type: Literal["text"]
    text: str


class PictureUrl(Body):
    """Where a picture is: a data URL, or one that the server may fetch."""

    url: str
    detail: Literal["auto", "low", "high"] | None = None


class PicturePart(Body):
    """A picture in a message."""

    type: Literal["image_url"]
    image_url: PictureUrl

    def for_template(self) -> dict[str, Any]:
        """The part as the tokenizer reads it."""
        return {"type": "image_url", "image_url": {"url": self.image_url.url}}


class SoundData(Body):
    """A sound in base64."""

    data: str
    format: str | None = None


class SoundPart(Body):
    """A sound in a message."""

    type: Literal["input_audio"]
    input_audio: SoundData

    def for_template(self) -> dict[str, Any]:
        """The part as the tokenizer reads it."""
        return {"type": "input_audio", "input_audio": {"data": self.input_audio.data}}


Part = Annotated[TextPart | PicturePart | SoundPart, Field(discriminator="type")]
KNOWN_PARTS = ("text", "image_url", "input_audio")


class CalledFunction(Body):
    """The function a model called and the JSON text of its arguments."""

    name: str
    arguments: str


class ToolCall(Body):
    """One call an assistant made."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction

    def for_template(self) -> dict[str, Any]:
        """The call as a chat template reads it: its arguments as an object."""
        function = {"name": self.function.name, "arguments": arguments_object(self.function.arguments)}
        return {"id": self.id, "type": "function", "function": function}


class Message(Body):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[Part], _first_of(4096)] | None = None
    name: str | None = None
    tool_calls: Annotated[list[ToolCall], _first_of(1024)] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    refusal: None = None
    annotations: list[Any] | None = None

    @field_validator("content", mode="before")
    @classmethod
    def _is_text(cls, content: Any) -> Any:
        for part in content if isinstance(content, list) else []:
            kind = part.get("type") if isinstance(part, dict) else None
            if isinstance(kind, str) and kind not in KNOWN_PARTS:
                raise ValueError(
                    f"a part of type {kind!r} cannot be read here; only text, image_url and input_audio can"
                )
        return content

    @model_validator(mode="after")
    def _says_something(self) -> Message:
        if self.content in (None, []) and not self.tool_calls:
            raise ValueError("a message needs content or tool_calls")
        if self.tool_calls and self.role != "assistant":
            raise ValueError("only an assistant's message may have tool_calls")
        return self

    def for_template(self) -> dict[str, Any]:
        """The message as a chat template reads it."""
        content: Any = self.content
        if isinstance(content, list):
            if all(isinstance(part, TextPart) for part in content):
                content = "".join(part.text for part in content if isinstance(part, TextPart))
            else:
                content = [
                    {"type": "text", "text": part.text} if isinstance(part, TextPart) else part.for_template()
                    for part in content
                ]
        turn: dict[str, Any] = {
            "role": "system" if self.role == "developer" else self.role,
            "content": content or "",
        }
        if self.reasoning_content is not None:
            turn["reasoning_content"] = self.reasoning_content
        if self.name is not None:
            turn["name"] = self.name
        if self.tool_call_id is not None:
            turn["tool_call_id"] = self.tool_call_id
        if self.tool_calls:
            turn["tool_calls"] = [call.for_template() for call in self.tool_calls]
        return turn


def arguments_object(text: str) -> Any:
    """The arguments of a call as the object a chat template prints."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise RequestRefused("the arguments of a tool call are not JSON", parameter="messages") from None


class FunctionSpecification(Body):
    """A function the model may call."""

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    @model_validator(mode="after")
    def _takes_an_object(self) -> FunctionSpecification:
        if (self.parameters or {}).get("type", "object") != "object":
            raise ValueError("a function's parameters have the type object")
        return self


class Tool(Body):
    """A tool the model may use."""

    type: Literal["function"]
    function: FunctionSpecification


class NamedFunction(Body):
    """The name of one function."""

    name: str


class NamedTool(Body):
    """The one tool the model must use."""

    type: Literal["function"]
    function: NamedFunction


class SearchBody(SearchSettings):
    """How an answer is searched for, and whether the client wants to see all that was drawn."""

    model_config = ConfigDict(strict=True)

    tree: bool = False


def _named_method(value: Any) -> Any:
    return {"method": value} if isinstance(value, str) else value


UNSEARCHED = (
    "top_k", "min_p", "typical_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
    "logit_bias", "min_tokens", "stop_token_ids", "regex", "logprobs", "tools", "tool_choice",
)  # fmt: skip
"""Fields that say how one answer is drawn or formed, which a search does not follow."""


class ChatBody(GenerationBody):
    """The body of /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=4096, fail_fast=True)]
    max_completion_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0)] | None = None
    tools: Annotated[list[Tool], _first_of(128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    overflow: Overflow | None = None  # what becomes of a conversation that is too long
    reasoning: Reasoning | None = None
    search: Annotated[SearchBody | None, BeforeValidator(_named_method)] = None

    @model_validator(mode="after")
    def _search_alone(self) -> ChatBody:
        if self.search is None:
            return self
        said = [name for name in UNSEARCHED if getattr(self, name)]
        said += ["n"] if self.n not in (None, 1) else []
        said += ["response_format"] if self.response_format and self.response_format.type != "text" else []
        said += ["overflow: slide"] if self.overflow == "slide" else []
        if said:
            raise ValueError(f"search draws answers in its own way; leave out {', '.join(said)}, or search")
        return self

    @model_validator(mode="after")
    def _top_needs_logprobs(self) -> ChatBody:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        return self

    @model_validator(mode="after")
    def _strict_is_kept(self) -> ChatBody:
        free = self.tool_choice is None or self.tool_choice == "auto"
        if free and any(tool.function.strict for tool in self.tools or ()):
            raise ValueError(
                "a tool's strict is kept only in calls that tool_choice forces: "
                "set it to required or to the tool, or leave strict out"
            )
        return self

    @model_validator(mode="after")
    def _room_for_thoughts(self) -> ChatBody:
        formed = self.response_format is not None and self.response_format.type != "text"
        formed |= self.regex is not None or self.tool_choice not in (None, "none", "auto")
        if self.reasoning in ("ask", "open") and formed:
            raise ValueError(
                f"reasoning: {self.reasoning} leaves thoughts before the answer; leave out response_format, "
                "regex and a forced tool_choice, whose form has no place for them"
            )
        return self


class CompletionBody(GenerationBody):
    """The body of /v1/completions."""

    prompt: Prompts
    echo: bool | None = None
    suffix: None = None
    best_of: Annotated[int, Field(ge=1)] | None = None
    logprobs: Annotated[int, Field(ge=0)] | None = None

    @model_validator(mode="after")
    def _best_is_all(self) -> CompletionBody:
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise ValueError("best_of other than n is not served")
        return self


class EmbeddingBody(Body):
    """The body of /v1/embeddings."""

    model: str
    input: Prompts
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Field(ge=1)] | None = None
    user: str | None = None


AnyBody = TypeVar("AnyBody", bound=Body)


def read_body(raw: bytes, kind: type[AnyBody]) -> AnyBody:
    """The request a body of bytes holds, or a refusal that says what is wrong with it."""
    if raw.count(b"[") + raw.count(b"{") > MOST_BRACKETS:
        raise RequestRefused(f"the body has more than {MOST_BRACKETS} opening brackets")
    try:
        fields = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise RequestRefused(f"the body is not UTF-8: {error.reason} at byte {error.start}") from None
    except RecursionError:
        raise RequestRefused("the body is nested too deeply") from None
    except ValueError as error:
        raise RequestRefused(f"the body is not JSON: {str(error)[:200]}") from None
    if not isinstance(fields, dict):
        raise RequestRefused("the body must be a JSON object")
    try:
        if b"\\ud" in raw.lower():
            json.dumps(fields, ensure_ascii=False).encode("utf-8")
        return kind.model_validate(fields)
    except UnicodeEncodeError:
        raise RequestRefused("the body holds half of a surrogate pair, which is no text") from None
    except ValidationError as error:
        raise _refusal(error) from None
    except RecursionError:
        raise RequestRefused("the body is nested too deeply") from None


def _refusal(error: ValidationError) -> RequestRefused:
    problem = error.errors(include_url=False, include_context=False, include_input=False)[0]
    place = ".".join(str(part) for part in problem["loc"])[:200]
    message = problem["msg"].removeprefix("Value error, ")[:300]
    if problem["type"] == "extra_forbidden":
        message = "this server knows no such field"
    code = "missing_required_parameter" if problem["type"] == "missing" else "invalid_value"
    return RequestRefused(f"{place}: {message}" if place else message, parameter=place or None, code=code)
