"""Who answers: a model of this machine in our engine, or one behind an endpoint; both cost tokens, one
money."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch

from trivium.generate.asking.budget import Cost
from trivium.generate.endpoint import ChatReply, Endpoint, EndpointSettings, Refused, Watch, most_tokens
from trivium.generate.engine import Engine
from trivium.generate.engines import EngineSettings
from trivium.generate.requests import Completion, GenerationEngine, Request, RequestHandle
from trivium.generate.sampling import Sampling
from trivium.kit import machine
from trivium.kit.errors import TriviumError
from trivium.kit.files import checksum
from trivium.kit.fingerprint import fingerprint
from trivium.model.folder import load_config, load_model
from trivium.tokens.tokenizer import Tokenizer

MOST_FAILED = 20
"""So many requests in a row without an answer, each after all its attempts, and the endpoint counts as
gone."""


@dataclass(frozen=True)
class ChatRequest:
    """A conversation to be answered, and how."""

    messages: tuple[Mapping[str, Any], ...]
    sampling: Sampling

    @cached_property
    def identity(self) -> str:
        """The same for the same question, sampling and seed."""
        wanted = {name: value for name, value in vars(self.sampling).items() if not name.startswith("_")}
        return fingerprint([list(self.messages), wanted])


Job = tuple[ChatRequest, Watch]
"""A request, and who counts its attempts."""


class Writer(Protocol):
    """Something that answers conversations."""

    name: str
    identity: str
    """Tells models apart in the cache."""
    paid: bool
    """Whether a request that was made and not answered may cost something."""

    def bound(self, request: ChatRequest) -> tuple[int, int]:
        """The most tokens that prompt and answer can have."""
        ...

    def cost(self, prompt_tokens: int, completion_tokens: int) -> Cost:
        """What an answer of so many tokens costs."""
        ...

    def write(self, jobs: Iterable[Job]) -> Iterator[tuple[Job, ChatReply | None]]:
        """Answers as they come, in any order; None where the watch let no attempt through."""
        ...

    def close(self) -> None:
        """Let go of what it holds."""
        ...


class LocalWriter:
    """The model of a Hugging Face folder in our engine, opened when something is to be asked."""

    paid = False

    def __init__(
        self, name: str, folder: Path, max_rows: int = 32, kind: Literal["own", "vllm"] = "own"
    ) -> None:
        self.name, self.folder, self.max_rows, self.kind = name, folder, max_rows, kind
        files = sorted(
            path for path in folder.rglob("*")
            if path.suffix in (".safetensors", ".json", ".jinja", ".model") and path.name != "stage.yaml"
        )  # fmt: skip
        self.identity = fingerprint([[path.name, checksum(path)] for path in files])

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        return Tokenizer.load(self.folder)

    @cached_property
    def engine(self) -> Engine:
        """The model in the engine."""
        place = machine.device()
        model = load_model(self.folder, dtype=machine.compute_dtype(place), device=place)
        return Engine(
            model.requires_grad_(False).eval(), self.tokenizer, max_rows=self.max_rows,
            prefix_cache_size=4, seed=0,
        )  # fmt: skip

    @cached_property
    def other(self) -> GenerationEngine | None:
        """The engine that answers in place of ours."""
        window = load_config(self.folder).reach
        return EngineSettings(kind=self.kind).open(self.folder, self.tokenizer, window)

    def _ids(self, request: ChatRequest) -> list[int]:
        """Through the chat template; a model without one goes on with the text."""
        if self.tokenizer.templates:
            return self.tokenizer.encode_prompt([dict(one) for one in request.messages])
        text = "\n\n".join(str(one.get("content") or "") for one in request.messages)
        first = self.tokenizer.beginning_id
        return [*([] if first is None else [first]), *self.tokenizer.encode(text)]

    def bound(self, request: ChatRequest) -> tuple[int, int]:
        return len(self._ids(request)), request.sampling.max_new_tokens

    def cost(self, prompt_tokens: int, completion_tokens: int) -> Cost:
        return Cost(prompt_tokens + completion_tokens, 1)

    def embed(self, texts: list[str]) -> np.ndarray:
        """The mean of each text's last hidden states, of length 1: [texts, width]."""
        most = min(self.engine.window, 512)
        ids = [self.tokenizer.encode(text)[:most] or [self.tokenizer.end_of_text_id] for text in texts]
        found = self.engine.embed(ids).float()
        return torch.nn.functional.normalize(found, dim=-1).cpu().numpy()

    def write(self, jobs: Iterable[Job]) -> Iterator[tuple[Job, ChatReply | None]]:
        """Keep twice as many requests in line as are computed at once, and give each answer as it ends."""
        if self.other is not None:
            yield from self._in_chunks(self.other, iter(jobs))
            return
        waiting, under_way = iter(jobs), dict[RequestHandle, Job]()
        held: Job | None = None
        try:
            while True:
                while len(under_way) < 2 * self.max_rows and (job := held or next(waiting, None)) is not None:
                    held = None
                    ids = self._ids(job[0])
                    room = self.engine.window - len(ids)
                    if not ids or room < job[0].sampling.max_new_tokens:
                        why = f"{len(ids)} tokens of prompt leave {max(room, 0)} of {self.engine.window}"
                        yield job, ChatReply("", "", 0, 0, f"too long: {why} for the answer")
                    elif job[1].attempt():
                        under_way[self.engine.submit(Request(ids, job[0].sampling))] = job
                    elif under_way:
                        # What those under way set aside and do not need may be enough for this one.
                        held = job
                        break
                    else:
                        yield job, None
                if not under_way:
                    return
                self.engine.step()
                for handle in [one for one in under_way if one.done]:
                    if handle.failure is not None:
                        raise handle.failure
                    yield under_way.pop(handle), _reply(handle.completions[0])
        finally:
            for handle in under_way:
                self.engine.cancel(handle)
            if under_way:
                self.engine.step()

    def _in_chunks(
        self, engine: GenerationEngine, jobs: Iterator[Job]
    ) -> Iterator[tuple[Job, ChatReply | None]]:
        """The same through an engine that takes many requests at once and gives all answers together."""
        while chunk := list(islice(jobs, 2 * self.max_rows)):
            asked: list[tuple[Job, Request]] = []
            for job in chunk:
                ids = self._ids(job[0])
                if len(ids) + job[0].sampling.max_new_tokens > engine.window:
                    yield job, ChatReply("", "", 0, 0, f"too long: {len(ids)} tokens of prompt")
                elif job[1].attempt():
                    asked.append((job, Request(ids, job[0].sampling)))
                else:
                    yield job, None
            answers = engine.generate([request for _, request in asked])
            for (job, _), (found,) in zip(asked, answers, strict=True):
                yield job, _reply(found)

    def close(self) -> None:
        for name in ("engine", "other"):
            self.__dict__.pop(name, None)


def _reply(found: Completion) -> ChatReply:
    return ChatReply(found.text, found.finish_reason, found.prompt_tokens, len(found.tokens))


class EndpointWriter:
    """A model behind an endpoint, asked by many threads."""

    paid = True

    def __init__(self, settings: EndpointSettings) -> None:
        self.settings = settings
        self.name = f"{settings.model} at {settings.url}"
        self.identity = fingerprint([settings.url, settings.model, settings.body])

    @cached_property
    def endpoint(self) -> Endpoint:
        """The connection."""
        return Endpoint(self.settings)

    def bound(self, request: ChatRequest) -> tuple[int, int]:
        return most_tokens(request.messages, request.sampling)

    def cost(self, prompt_tokens: int, completion_tokens: int) -> Cost:
        money = self.settings.cost(prompt_tokens, completion_tokens)
        return Cost(prompt_tokens + completion_tokens, 1, money)

    def write(self, jobs: Iterable[Job]) -> Iterator[tuple[Job, ChatReply | None]]:
        waiting, under_way = iter(jobs), dict[Future[ChatReply | None], Job]()
        with ThreadPoolExecutor(self.settings.concurrency) as pool:
            try:
                while True:
                    while len(under_way) < 2 * self.settings.concurrency:
                        job = next(waiting, None)
                        if job is None:
                            break
                        under_way[pool.submit(self._ask, job)] = job
                    if not under_way:
                        return
                    for future in wait(under_way, return_when=FIRST_COMPLETED).done:
                        job = under_way.pop(future)
                        reply = future.result()
                        if (
                            reply is not None
                            and reply.failure
                            and self.endpoint.failed_in_a_row > MOST_FAILED
                        ):
                            raise TriviumError(
                                f"{self.name} does not answer any more ({reply.failure}); what it has "
                                f"answered "
                                "is kept: run the same command again when it does."
                            )
                        yield job, reply
            except BaseException:
                self.close()
                pool.shutdown(cancel_futures=True)
                raise

    def _ask(self, job: Job) -> ChatReply | None:
        try:
            return self.endpoint.chat(job[0].messages, job[0].sampling, job[1])
        except Refused:
            return None

    def close(self) -> None:
        if "endpoint" in self.__dict__:
            self.__dict__.pop("endpoint").close()
