"""Who answers: a model of this machine in our engine, or one behind an endpoint; both cost tokens, one
money."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import chain, islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from trivium.generate.asking.budget import Cost
from trivium.generate.endpoint import ChatReply, Endpoint, EndpointSettings, Refused, Watch, most_tokens
from trivium.generate.engine import Engine
from trivium.generate.engines import EngineSettings
from trivium.generate.requests import Completion, GenerationEngine, Request, RequestHandle
from trivium.generate.sampling import Sampling
from trivium.generate.search.explore import Explorer
from trivium.generate.search.run import SearchResult
from trivium.generate.search.settings import SearchSettings
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
    search: SearchSettings | None = None
    """How the answer is searched for, with the scorer where it lies; the seed is that of `sampling`."""

    @cached_property
    def identity(self) -> str:
        """The same for the same question, sampling and seed, and the same search by the same scorer."""
        wanted = {name: value for name, value in vars(self.sampling).items() if not name.startswith("_")}
        if self.search is None:
            return fingerprint([list(self.messages), wanted])
        search = {**self.search.model_dump(), "scorer": _content(self.search.scorer)}
        return fingerprint([list(self.messages), wanted, search])

    @property
    def most_tokens(self) -> int:
        """The most tokens that are drawn for an answer."""
        longest = self.sampling.max_new_tokens
        searched = None if self.search is None else self.search.most_tokens(longest)
        return longest if searched is None else searched


def _content(named: str | Mapping[str, Any] | None) -> Any:
    """A scorer by what it is, wherever it lies: of a folder or a file what is in it."""
    if isinstance(named, Mapping):
        return {name: _content(one) if name == "model" else one for name, one in named.items()}
    if named is None:
        return None
    file, mark, function = named.rpartition(".py:")
    if mark:
        return [checksum(Path(f"{file}.py")), function]
    return _identity(Path(named)) if Path(named).is_dir() else named


@lru_cache(64)
def _identity(folder: Path) -> str:
    """The same for the same model and tokenizer, wherever they lie."""
    files = sorted(
        path for path in folder.rglob("*")
        if path.suffix in (".safetensors", ".json", ".jinja", ".model") and path.name != "stage.yaml"
    )  # fmt: skip
    return fingerprint([[path.name, checksum(path)] for path in files])


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

    def cost(self, prompt_tokens: int, completion_tokens: int) -> Cost:
        """What an answer of so many tokens costs."""

    def write(self, jobs: Iterable[Job]) -> Iterator[tuple[Job, ChatReply | None]]:
        """Answers as they come, in any order; None where the watch let no attempt through."""

    def close(self) -> None:
        """Let go of what it holds."""


class Searches(Protocol):
    """Makes and runs searches of one kind (`evals.searching.Searcher`)."""

    def explorer(
        self, ids: list[int], prompt: Any, most: int, stop: tuple[str, ...] = (), place: int = 0
    ) -> Explorer:
        """A search to a prompt, of solutions up to `most` tokens."""

    def run(self, explorers: Sequence[Explorer]) -> list[SearchResult]:
        """All searches side by side."""


class LocalWriter:
    """The model of a Hugging Face folder in our engine, opened when something is to be asked."""

    paid = False

    def __init__(
        self,
        name: str,
        folder: Path,
        max_rows: int = 32,
        chosen: EngineSettings | None = None,
        searcher: Callable[[Engine, SearchSettings], Searches] | None = None,
    ) -> None:
        """`searcher` makes the searches of those who ask for any: it opens scorers, which lie above this."""
        self.searcher = searcher
        self.name, self.folder, self.max_rows = name, folder, max_rows
        self.chosen = chosen or EngineSettings()
        self.identity = _identity(folder)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer.load(self.folder)

    @cached_property
    def engine(self) -> Engine:
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
        return self.chosen.open(self.folder, self.tokenizer, window)

    def _ids(self, request: ChatRequest) -> list[int]:
        """Through the chat template; a model without one goes on with the text."""
        if self.tokenizer.templates:
            return self.tokenizer.encode_prompt([dict(one) for one in request.messages])
        text = "\n\n".join(str(one.get("content") or "") for one in request.messages)
        first = self.tokenizer.beginning_id
        return [*([] if first is None else [first]), *self.tokenizer.encode(text)]

    def bound(self, request: ChatRequest) -> tuple[int, int]:
        return len(self._ids(request)), request.most_tokens

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
        first = next(waiting, None)
        if first is None:
            return
        waiting = chain([first], waiting)
        if first[0].search is not None:
            yield from self._by_search(first[0].search, waiting)
            return
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

    def _by_search(
        self, search: SearchSettings, jobs: Iterator[Job]
    ) -> Iterator[tuple[Job, ChatReply | None]]:
        """Answers that are searched for, as many side by side as there are rows for their solutions."""
        assert self.searcher is not None, "a search needs a `searcher` that makes it"
        searcher = self.searcher(self.engine, search)
        most, held = max(1, self.max_rows // search.n), None
        while True:
            asked: list[tuple[Job, Explorer]] = []
            while len(asked) < most and (job := held or next(jobs, None)) is not None:
                held = None
                request, ids = job[0], self._ids(job[0])
                assert request.search == search, "a step asks for all its answers in one way"
                if len(ids) + request.sampling.max_new_tokens > self.engine.window:
                    yield job, ChatReply("", "", 0, 0, f"too long: {len(ids)} tokens of prompt")
                elif job[1].attempt():
                    longest, seed = request.sampling.max_new_tokens, request.sampling.seed or 0
                    explorer = searcher.explorer(
                        ids, list(request.messages), longest, request.sampling.stop, seed
                    )
                    asked.append((job, explorer))
                elif asked:
                    # What those that are searched for set aside and do not need may be enough for this one.
                    held = job
                    break
                else:
                    yield job, None
            if not asked:
                return
            for (job, explorer), found in zip(asked, searcher.run([one for _, one in asked]), strict=True):
                reason = "stop" if found.ended else "length"
                yield job, ChatReply(found.text, reason, len(explorer.prompt), found.tokens)

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
                for job in under_way.values():
                    # One that waits for what others set aside would wait for ever: that is not settled now.
                    job[1].stop()
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
