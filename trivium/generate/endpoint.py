"""A model behind an OpenAI-compatible endpoint: asked politely, asked again where it fails, counted honestly.

Every attempt passes `Watch.attempt`, which may refuse it, so that a budget counts requests that failed, too.
An attempt that may have been paid for and brought nothing (half an answer, garbage) is reported to
`Watch.lost`.
"""

from __future__ import annotations

import json
import os
import random
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urlsplit

from pydantic import Field, field_validator

from trivium.kit.errors import TriviumError, needing
from trivium.kit.numbers import Count
from trivium.kit.settings import Settings

if TYPE_CHECKING:
    import httpx

    from trivium.generate.sampling import Sampling

AGAIN = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
"""Answers after which the same request may succeed."""
BARRED = frozenset({301, 302, 303, 307, 308, 401, 402, 403, 404, 405})
"""Answers that every other request would get as well."""
FIRST_WAIT, LONGEST_WAIT = 0.5, 60.0
LONGEST_PAUSE = 3600.0
"""What `Retry-After` may ask for at most, in seconds."""
LONGEST_BODY = 2**26
"""Bytes of an answer at most; a server that sends without end does not fill the memory."""
OF_A_MESSAGE = 16
"""Tokens that a template spends on a message at most, about."""


class EndpointSettings(Settings):
    """Where a model answers under OpenAI's protocol, and how it may be asked."""

    url: str
    """Its address up to `/v1`, as in https://api.example.com/v1."""
    model: str
    """What the model is called there."""
    key_env: str | None = None
    """The environment variable that holds the key; the key itself never stands in a recipe."""
    concurrency: int = Field(default=16, ge=1, le=1024)
    """How many requests are in flight at once."""
    timeout: float = Field(default=300.0, gt=0)
    """Seconds after which a request counts as failed."""
    retries: int = Field(default=6, ge=0, le=100)
    """How often a request that failed is made again, after 0.5, 1, 2, ... seconds or as `Retry-After`
    says."""
    requests_per_minute: float | None = Field(default=None, gt=0)
    """At most so many requests a minute."""
    tokens_per_minute: Count | None = Field(default=None, ge=1)
    """At most about so many tokens a minute, prompts included."""
    prompt_price: float = Field(default=0.0, ge=0)
    """What a million tokens of prompts cost, in the currency of `budget.money`."""
    completion_price: float = Field(default=0.0, ge=0)
    """What a million tokens of answers cost."""
    body: dict[str, Any] = {}
    """Further keys of every request's body."""

    @field_validator("url")
    @classmethod
    def _is_address(cls, url: str) -> str:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("`url` is an address such as https://api.example.com/v1")
        if parts.username or parts.password:
            raise ValueError("`url` holds a password; name the variable that holds the key as `key_env`")
        return url.rstrip("/")

    def key(self) -> str | None:
        """The key from the environment."""
        if self.key_env is None:
            return None
        found = os.environ.get(self.key_env)
        if not found:
            raise TriviumError(
                f"The environment variable {self.key_env}, which `key_env` names, is not set; export it."
            )
        return found

    def cost(self, prompt_tokens: int, completion_tokens: int) -> float:
        """The price of an answer."""
        return (prompt_tokens * self.prompt_price + completion_tokens * self.completion_price) / 1e6


@dataclass(frozen=True)
class ChatReply:
    """What a model answered to a conversation, or why there is no answer."""

    text: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    failure: str | None = None


class Watch(Protocol):
    """Who counts attempts."""

    def attempt(self) -> bool:
        """Whether one more request may be made; called before each."""

    def lost(self) -> None:
        """An attempt was perhaps paid for and brought nothing."""

    def stop(self) -> None:
        """The asking ends: an attempt that waits to be let through is not made."""


class Refused(Exception):
    """The watch let no further attempt through."""


def most_tokens(messages: Sequence[Mapping[str, Any]], sampling: Sampling) -> tuple[int, int]:
    """Bounds on the tokens of prompt and answer: no tokenizer makes more tokens than there are bytes."""
    sizes = [len(str(one.get("content") or "").encode("utf-8", "replace")) for one in messages]
    return sum(sizes) + OF_A_MESSAGE * (len(sizes) + 1), sampling.max_new_tokens


class Endpoint:
    """Asks one model of one server, from as many threads as `concurrency` says."""

    def __init__(self, settings: EndpointSettings) -> None:
        with needing("Asking an endpoint needs httpx: pip install 'trivium[endpoint]'."):
            import httpx
        self.settings = settings
        self.failed_in_a_row = 0
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._next = {"requests": 0.0, "tokens": 0.0}
        self._not_before = 0.0
        key = settings.key()
        host = urlsplit(settings.url).hostname or ""
        self._client = httpx.Client(
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=httpx.Timeout(settings.timeout, connect=min(30.0, settings.timeout)),
            limits=httpx.Limits(max_connections=settings.concurrency),
            # A proxy is for what lies outside this machine.
            trust_env=host not in ("localhost", "127.0.0.1", "::1"),
            # A key must not follow a redirection to another server.
            follow_redirects=False,
        )

    def close(self) -> None:
        """End all waiting and close the connections."""
        self._stopped.set()
        self._client.close()

    def chat(
        self, messages: Sequence[Mapping[str, Any]], sampling: Sampling, watch: Watch | None = None
    ) -> ChatReply:
        """The answer to a conversation; after the last attempt a reply that says why there is none."""
        body = {
            **self.settings.body, "model": self.settings.model, "messages": list(messages),
            **_asked(sampling),
        }  # fmt: skip
        bound = sum(most_tokens(messages, sampling))
        answer, failure = self._attempts("/chat/completions", body, bound, _read_chat, watch)
        return answer if answer is not None else ChatReply("", "", 0, 0, failure)

    def body_of(self, sampling: Sampling) -> dict[str, Any]:
        """How to draw, in the protocol's words."""
        return _asked(sampling)

    def completions(self, body: Mapping[str, Any], bound: int, read: Any) -> tuple[Any, str | None]:
        """What `read` makes of the answer to a request for plain text, or None and why there is none."""
        whole = {**self.settings.body, "model": self.settings.model, **body}
        return self._attempts("/completions", whole, bound, read, None)

    def _attempts(
        self, path: str, body: Mapping[str, Any], bound: int, read: Any, watch: Watch | None
    ) -> tuple[Any, str | None]:
        """What `read` makes of the answer, or None and why there is none."""
        failure = ""
        for attempt in range(self.settings.retries + 1):
            self._wait_for_turn(bound)
            if watch is not None and not watch.attempt():
                raise Refused
            status, found, wait = self._once(path, body, read)
            if status == 200 and not isinstance(found, str):
                self.failed_in_a_row = 0
                return found, None
            failure = str(found)
            if status == 200 and watch is not None:
                watch.lost()
            if status in BARRED:
                raise TriviumError(
                    f"{self.settings.url} refuses every request for {self.settings.model}: {failure}; check "
                    "`url`, `model` and `key_env`."
                )
            if status != 200 and status != 0 and status not in AGAIN:
                return None, f"refused by the endpoint: {failure}"
            if attempt < self.settings.retries:
                self._pause(wait, attempt)
        with self._lock:
            self.failed_in_a_row += 1
        return None, f"no answer after {self.settings.retries + 1} attempts: {failure}"

    def _once(self, path: str, body: Mapping[str, Any], read: Any) -> tuple[int, Any, float | None]:
        """The status (200 as well where a body broke off), what was read or what is wrong, and how long to
        wait."""
        import httpx

        try:
            answer, content = self._post(path, body)
        except (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout) as error:
            return 0, f"{type(error).__name__}: {error}", None
        except httpx.HTTPError as error:
            # It was sent, and perhaps worked on: an answer that broke off, or came too late.
            return 200, f"{type(error).__name__}: {error}", None
        if answer.status_code != 200:
            wait = _retry_after(answer.headers.get("Retry-After"))
            return answer.status_code, _said(answer, content), wait
        try:
            return 200, read(parsed(content)), None
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
            why = _error_message(content) or f"{type(error).__name__}: {error}"
            return 200, f"the answer is no {path[1:]} object ({why})", None

    def _post(self, path: str, body: Mapping[str, Any]) -> tuple[httpx.Response, bytes]:
        """An answer with its content, as a whole within `timeout`, where httpx bounds each read alone."""
        import httpx

        deadline, content = time.monotonic() + self.settings.timeout, bytearray()
        with self._client.stream("POST", self.settings.url + path, json=body) as answer:
            for piece in answer.iter_bytes():
                content += piece
                if time.monotonic() > deadline:
                    raise httpx.ReadTimeout(f"no whole answer within {self.settings.timeout:g} s")
                if len(content) > LONGEST_BODY:
                    raise httpx.ReadError(f"the answer is longer than {LONGEST_BODY:,} bytes")
        return answer, bytes(content)

    def _wait_for_turn(self, tokens: int) -> None:
        """Keep to the rates, and to the latest `Retry-After`."""
        spacing = {
            "requests": 60 / self.settings.requests_per_minute if self.settings.requests_per_minute else 0.0,
            "tokens": 60 * tokens / self.settings.tokens_per_minute
            if self.settings.tokens_per_minute
            else 0.0,
        }
        with self._lock:
            now = time.monotonic()
            turn = max(now, self._not_before, *(self._next[name] for name in spacing))
            for name, seconds in spacing.items():
                self._next[name] = max(now, self._next[name], turn if seconds else 0.0) + seconds
        self._sleep(turn - now)
        # Others may have been told to wait in the meantime.
        while (left := self._not_before - time.monotonic()) > 0:
            self._sleep(left)

    def _pause(self, wait: float | None, attempt: int) -> None:
        """Wait before the next attempt; a server that names a time is left alone by all threads until
        then."""
        if wait is not None:
            with self._lock:
                self._not_before = max(self._not_before, time.monotonic() + wait)
            return
        # Drawn at random, so that requests that failed together do not come back together.
        self._sleep(min(LONGEST_WAIT, FIRST_WAIT * 2**attempt) * random.uniform(0.5, 1.0))

    def _sleep(self, seconds: float) -> None:
        if self._stopped.is_set() or (seconds > 0 and self._stopped.wait(seconds)):
            raise Refused


def parsed(content: str | bytes) -> Any:
    """JSON that a model or its server wrote, with U+FFFD where it escapes half a surrogate pair.

    A server that cuts an answer inside an emoji writes such a half; no text file can hold it.
    """
    found = json.loads(content)
    text = json.dumps(found, ensure_ascii=False)
    whole = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return found if whole == text else json.loads(whole)


def _asked(sampling: Sampling) -> dict[str, Any]:
    """Sampling in the protocol's words; what has its default is left unsaid, since not every server knows
    it."""
    wanted: dict[str, Any] = {
        "max_tokens": sampling.max_new_tokens, "temperature": sampling.temperature, "top_p": sampling.top_p,
    }  # fmt: skip
    if sampling.seed is not None:
        wanted["seed"] = sampling.seed
    if sampling.stop:
        wanted["stop"] = list(sampling.stop)
    for name in ("presence_penalty", "frequency_penalty"):
        if getattr(sampling, name):
            wanted[name] = getattr(sampling, name)
    if sampling.json_schema is not None:
        form = {"name": "answer", "schema": dict(sampling.json_schema), "strict": True}
        wanted["response_format"] = {"type": "json_schema", "json_schema": form}
    return wanted


def _read_chat(content: Any) -> ChatReply:
    """The first choice of a chat completion."""
    choice = content["choices"][0]
    text = choice["message"]["content"]
    if text is None and choice.get("finish_reason"):
        # A refusal, or thoughts that took all tokens: whole, paid for, and the same if asked again.
        text = ""
    if not isinstance(text, str):
        raise TypeError("its content is no text")
    told = content.get("usage")
    usage = told if isinstance(told, Mapping) else {}
    return ChatReply(
        text, str(choice.get("finish_reason") or "stop"),
        _whole(usage.get("prompt_tokens")), _whole(usage.get("completion_tokens")),
    )  # fmt: skip


def _whole(value: Any) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else 0


def _error_message(content: bytes) -> str | None:
    """What the `error` of a body says, if it has one."""
    try:
        error = parsed(content)["error"]
        return " ".join(str(error["message"] if isinstance(error, Mapping) else error).split())[:200]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def _said(answer: httpx.Response, content: bytes) -> str:
    """A status with what the server says of it, in few words."""
    if answer.is_redirect:
        return f"{answer.status_code} redirects to {answer.headers.get('Location')}"
    text = _error_message(content) or " ".join(content.decode(errors="replace").split())[:200]
    return f"{answer.status_code} {text}".strip()


def _retry_after(value: str | None) -> float | None:
    """Seconds from a header that holds seconds or a date; None where they are over or cannot be read."""
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            when = parsedate_to_datetime(value)
        except (ValueError, OverflowError):
            return None
        # A date that ends in -0000 comes without a zone.
        seconds = (when.replace(tzinfo=when.tzinfo or UTC) - datetime.now(UTC)).total_seconds()
    return min(seconds, LONGEST_PAUSE) if seconds > 0 else None
