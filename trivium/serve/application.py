"""The routes: OpenAI's, the page's, and what operators look at."""

from __future__ import annotations

import asyncio
import base64
import logging
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import numpy as np
from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from trivium.generate.chat_fit import Fitted, Summariser
from trivium.generate.constraints import Constraint, form_of
from trivium.generate.requests import Request as Wanted
from trivium.generate.sampling import Sampling
from trivium.generate.search.run import SearchResult
from trivium.serve import failures
from trivium.serve.answers import Answer, ChatSample, CompletionSample, Pieces, Sample, Usage, event
from trivium.serve.background import Background
from trivium.serve.calls import call_form, forces_call, form_of_calls
from trivium.serve.connection import ClientGone, EventStream, read_bytes, while_connected
from trivium.serve.failures import RequestRefused, error_body
from trivium.serve.fetching import all_fetched
from trivium.serve.fitting import Asking, left_out_of
from trivium.serve.forms import Forms
from trivium.serve.guard import PAGE, Guard
from trivium.serve.limits import Limits
from trivium.serve.measures import Measures
from trivium.serve.parts import PartStream
from trivium.serve.pictures import refuse_to_fetch, urls_in
from trivium.serve.pieces import Scored, TokenNames
from trivium.serve.prompts import (
    alternatives,
    asked_length,
    chat_prompt,
    conversation_of,
    longest_prompt,
    sampling,
    token_prompts,
)
from trivium.serve.protocol import ChatBody, CompletionBody, EmbeddingBody, read_body
from trivium.serve.searching import Searches, SearchOfClient, in_one_piece, told_of_search
from trivium.serve.worker import Adapted, Worker
from trivium.tokens.items import is_item

FOLDER = Path(__file__).parent / "page"
CLIENT_CLOSED = 499
Result = TypeVar("Result")
log = logging.getLogger("trivium.serve")


class Served:
    """The models of one server, and what it does with requests for them."""

    def __init__(
        self,
        workers: Sequence[Worker | Adapted],
        limits: Limits,
        measures: Measures,
        judges: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        self.workers = {worker.name: worker for worker in workers}
        assert len(self.workers) == len(workers), "two models of one name"
        self.limits, self.measures = limits, measures
        self.searches = Searches(limits, judges)
        self.background = Background()
        self.forms = Forms(limits.grammar_seconds)
        self.started = int(time.time())
        self.longest = {worker.name: longest_prompt(worker.tokenizer, worker.context) for worker in workers}
        self.names = {worker.name: TokenNames(worker.tokenizer) for worker in workers}

    def worker(self, model: str) -> Worker | Adapted:
        """The worker of a model, or a refusal that names those there are."""
        worker = self.workers.get(model)
        if worker is None:
            known = ", ".join(self.workers)
            problem = f"the model {model[:100]!r} is not served here; there are: {known}"
            raise RequestRefused(problem, status=404, parameter="model", code="model_not_found")
        return worker

    def room(
        self, worker: Worker | Adapted, prompt: list[int], parameter: str, *, slides: bool = False
    ) -> int:
        """How many tokens may follow a prompt, or a refusal when that is none."""
        most = sys.maxsize if slides else worker.context - 1
        if self.limits.prompt_tokens is not None:
            most = min(most, self.limits.prompt_tokens)
        if len(prompt) > most:
            problem = f"the prompt has {len(prompt)} tokens; {worker.name} takes at most {most}"
            raise RequestRefused(problem, parameter=parameter, code="context_length_exceeded")
        return self.limits.new_tokens if slides else worker.context - len(prompt)

    def length(self, worker: Worker | Adapted, prompt: list[int], asked: int, parameter: str) -> None:
        """Refuse an answer that would not fit behind its prompt."""
        if len(prompt) + asked > worker.context:
            problem = (
                f"{len(prompt)} prompt tokens and {asked} new ones make {len(prompt) + asked}; "
                f"the context of {worker.name} holds {worker.context}"
            )
            raise RequestRefused(problem, parameter=parameter, code="context_length_exceeded")

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        body = read_body(await read_bytes(request, self.limits), ChatBody)
        worker = self.worker(body.model)
        pictures = await self._fetched(request, body, worker)
        asking = Asking(worker)
        summariser = Summariser(worker.tokenizer, worker.context, asking.complete)
        summarised = body.overflow == "summarise"
        run = self.background.wait if summarised else self.background.compute
        preparing = run(
            chat_prompt, body, worker.tokenizer, worker.context, self.limits, self.longest[worker.name],
            summariser, pictures,
        )  # fmt: skip
        try:
            fitted = await self._in_time(request, preparing, "summary" if summarised else "prompt")
        finally:
            asking.close()
        prompt, slides = fitted.tokens, fitted.slide is not None
        room = self.room(worker, prompt, "messages", slides=slides)
        chosen = sampling(body, worker.tokenizer, self.limits, room, worker.sampling_defaults)
        if not slides:
            self.length(worker, prompt, chosen.max_new_tokens, "max_tokens")
        formatted = chosen.json_schema is not None or chosen.regex is not None
        opened = not formatted and fitted.thinking
        form, forced = form_of_calls(body, worker.tokenizer), forces_call(body)
        calls = form.kind if form is not None and (forced or not formatted) else None
        offered = frozenset(tool.function.name for tool in body.tools or ())
        samples: list[Sample] = [
            ChatSample(
                index,
                PartStream(
                    reasoning=not formatted,
                    opened=opened,
                    calls=calls,
                    names=offered,
                    forced=forced,
                    single=body.parallel_tool_calls is False,
                ),
                self.names[worker.name],
                alternatives(body),
            )
            for index in range(body.n or 1)
        ]
        headers, note = left_out_of(fitted, worker.context, summariser)
        usage = Usage(len(prompt))
        if body.search is not None:
            found = await self._searched(request, body, worker, fitted, room)
            note = {**note, "search": told_of_search(found, tree=body.search.tree)}
            answer = Answer("chat.completion", worker.name, samples, usage, note)
            response = await self._respond(request, body, answer, in_one_piece(found), _nothing)
            response.headers.update(headers)
            return response
        constraint = await self._form(request, worker, chosen)
        wanted = Wanted(prompt, chosen, n=body.n or 1, slide=fitted.slide, constraint=constraint)
        generation = await worker.submit([wanted])
        answer = Answer("chat.completion", worker.name, samples, usage, note)
        response = await self._respond(request, body, answer, generation.pieces(), generation.close)
        response.headers.update(headers)
        return response

    async def _fetched(
        self, request: Request, body: ChatBody, worker: Worker | Adapted
    ) -> Mapping[str, bytes]:
        """What lies at the URLs of the request's pictures, for a model that takes any."""
        forms = worker.tokenizer.forms
        if (
            forms is None
            or forms.picture is None
            or not any(isinstance(one.content, list) for one in body.messages)
        ):
            return {}
        urls = urls_in(conversation_of(body, self.longest[worker.name])[1])
        refuse_to_fetch(urls, self.limits)
        if not urls:
            return {}
        return await self._in_time(request, self.background.fetch(all_fetched, urls), "pictures")

    async def completion(self, request: Request) -> Response:
        """POST /v1/completions."""
        body = read_body(await read_bytes(request, self.limits), CompletionBody)
        worker = self.worker(body.model)
        preparing = self.background.compute(
            token_prompts, body, worker.tokenizer, self.longest[worker.name], self.limits
        )
        prompts = await self._in_time(request, preparing, "prompt")
        wanted = []
        for prompt in prompts:
            room = self.room(worker, prompt, "prompt")
            if body.max_tokens is None:
                room = min(room, 16)  # what OpenAI's reference gives this route when nothing is asked for
            chosen = sampling(body, worker.tokenizer, self.limits, room, worker.sampling_defaults)
            self.length(worker, prompt, chosen.max_new_tokens, "max_tokens")
            constraint = await self._form(request, worker, chosen)
            wanted.append(Wanted(prompt, chosen, n=body.n or 1, constraint=constraint))
        echoed: list[tuple[Scored, ...]] = [()] * len(prompts)
        if body.echo and body.logprobs is not None:
            echoed = await self._in_time(request, worker.score(prompts, body.logprobs), "log-probabilities")
        names, samples = self.names[worker.name], list[Sample]()
        for prompt, scored in zip(prompts, echoed, strict=True):
            echo = worker.tokenizer.decode(prompt) if body.echo else ""
            for _ in range(body.n or 1):
                samples.append(CompletionSample(len(samples), names, body.logprobs, echo, scored))
        generation = await worker.submit(wanted)
        usage = Usage(sum(len(prompt) for prompt in prompts))
        answer = Answer("text_completion", worker.name, samples, usage)
        return await self._respond(request, body, answer, generation.pieces(), generation.close)

    async def _form(self, request: Request, worker: Worker | Adapted, chosen: Sampling) -> Constraint | None:
        """The form that the answer must have, compiled; None where it is free."""
        form = form_of(chosen.json_schema, chosen.regex)
        if form is None:
            return None
        return await self._in_time(
            request, self.forms.constraint(worker.name, worker.grammars, form), "form of the answer"
        )

    async def _searched(
        self, request: Request, body: ChatBody, worker: Worker | Adapted, fitted: Fitted, room: int
    ) -> SearchResult:
        """The answer that a search finds, and its tree."""
        assert body.search is not None
        if any(map(is_item, fitted.tokens)):
            raise RequestRefused("a search reads no pictures and sounds; leave them out", parameter="search")
        settings = self.searches.settings(body, asked_length(body, self.limits), room)
        assert settings.max_new_tokens is not None
        self.length(worker, fitted.tokens, settings.max_new_tokens, "search.max_new_tokens")
        judge = self.searches.judge(settings.scorer)
        with self.searches.one():
            search = SearchOfClient(worker, settings, judge, fitted.messages, fitted.tokens, body.stops)
            try:
                found = await self._in_time(request, self.background.wait(search.run), "search")
            finally:
                search.close()
        self.measures.count("trivium_searches_total", model=worker.name, method=settings.method)
        self.measures.count("trivium_search_tokens_total", found.tokens, model=worker.name)
        return found

    async def _respond(
        self,
        request: Request,
        body: ChatBody | CompletionBody,
        answer: Answer,
        pieces: Pieces,
        close: Callable[[], None],
    ) -> Response:
        if body.stream:
            seconds = self.limits.request_seconds
            options = body.stream_options
            include_usage = options is not None and options.include_usage
            events = answer.events(pieces, include_usage=include_usage)
            late = event(error_body(_late("answer", seconds), 504))
            return EventStream(events, seconds=seconds, late=late, on_close=close)
        try:
            whole = await self._in_time(request, answer.whole(pieces), "answer")
        finally:
            close()
        return JSONResponse(whole)

    async def _in_time(self, request: Request, work: Coroutine[Any, Any, Result], what: str) -> Result:
        """The result of the work, unless the client leaves or its time is over."""
        seconds = self.limits.request_seconds
        try:
            async with asyncio.timeout(seconds):
                return await while_connected(request.receive, work)
        except TimeoutError:
            raise RequestRefused(_late(what, seconds), status=504) from None

    async def embeddings(self, request: Request) -> Response:
        """POST /v1/embeddings: the mean of the last hidden states."""
        body = read_body(await read_bytes(request, self.limits), EmbeddingBody)
        worker = self.worker(body.model)
        preparing = self.background.compute(
            token_prompts, body, worker.tokenizer, self.longest[worker.name], self.limits
        )
        prompts = await self._in_time(request, preparing, "prompt")
        for prompt in prompts:
            self.room(worker, prompt, "input")
        if body.dimensions not in (None, worker.width):
            problem = f"the embeddings of {worker.name} have {worker.width} dimensions"
            raise RequestRefused(problem, parameter="dimensions", code="unsupported_value")
        vectors = await self._in_time(request, worker.embed(prompts), "embeddings")
        packed = body.encoding_format == "base64"
        data = [
            {"object": "embedding", "index": index, "embedding": _packed(row) if packed else row.tolist()}
            for index, row in enumerate(vectors)
        ]
        count = sum(len(prompt) for prompt in prompts)
        usage = {"prompt_tokens": count, "total_tokens": count}
        return JSONResponse({"object": "list", "data": data, "model": worker.name, "usage": usage})

    def models(self) -> dict:
        """GET /v1/models."""
        return {"object": "list", "data": [self._card(worker) for worker in self.workers.values()]}

    def _card(self, worker: Worker | Adapted) -> dict:
        forms = worker.tokenizer.forms
        facts = {
            "context": worker.context,
            "width": worker.width,
            "parameters": worker.parameters,
            "chat": bool(worker.tokenizer.templates),
            "tools": call_form(worker.tokenizer) is not None,
            "pictures": forms is not None and forms.picture is not None,
            "sounds": forms is not None and forms.sound is not None,
            "new_tokens": self.limits.new_tokens,
            "top_logprobs": self.limits.top_logprobs,
            "search": self.searches.facts,
        }
        card = {"id": worker.name, "object": "model", "created": self.started, "owned_by": "trivium"}
        return {**card, "trivium": facts}

    def health(self) -> Response:
        """GET /health: 200 while every model's thread is alive."""
        dead = [worker.name for worker in self.workers.values() if not worker.alive]
        body = {"status": "failed" if dead else "ok", "failed": dead, "models": list(self.workers)}
        return JSONResponse(body, 503 if dead else 200)


def _nothing() -> None:
    """Nothing is left to be freed."""


def _late(what: str, seconds: float) -> str:
    return f"the {what} took longer than {seconds:g} s"


def _packed(row: np.ndarray) -> str:
    return base64.b64encode(row.astype("<f4").tobytes()).decode("ascii")


def build(
    workers: Sequence[Worker | Adapted],
    *,
    limits: Limits,
    measures: Measures,
    key: str | None = None,
    local_only: bool = True,
    origins: Sequence[str] = (),
    judges: Mapping[str, Any] = MappingProxyType({}),
) -> ASGIApp:
    """The whole application, its workers started and stopped with it; `judges` score searches."""
    served = Served(workers, limits, measures, judges)

    @asynccontextmanager
    async def lifespan(application: FastAPI) -> AsyncIterator[None]:
        for worker in workers:
            worker.start(asyncio.get_running_loop())
        yield
        served.background.stop()
        await asyncio.to_thread(served.forms.stop)
        for worker in workers:
            await asyncio.to_thread(worker.stop)

    routes = FastAPI(title="Trivium", docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)
    failures.install(routes)

    async def gone(request: Request, error: Exception) -> Response:
        return Response(status_code=CLIENT_CLOSED)

    routes.add_exception_handler(ClientGone, gone)
    for path, endpoint in (
        ("/v1/chat/completions", served.chat),
        ("/v1/completions", served.completion),
        ("/v1/embeddings", served.embeddings),
    ):
        routes.add_api_route(path, endpoint, methods=["POST"], response_model=None)
    routes.add_api_route("/v1/models", served.models, methods=["GET"], response_model=None)
    routes.add_api_route("/health", served.health, methods=["GET"], response_model=None)

    @routes.get("/v1/models/{name:path}", response_model=None)
    def model(name: str) -> dict:
        return served._card(served.worker(name))

    @routes.get("/metrics", response_model=None)
    def metrics() -> Response:
        return PlainTextResponse(measures.text(), media_type="text/plain; version=0.0.4")

    def page(request: Request) -> Response:
        return FileResponse(FOLDER / PAGE[request.url.path], headers={"Cache-Control": "no-cache"})

    for path in PAGE:
        routes.add_api_route(path, page, methods=["GET"], response_model=None)

    application: ASGIApp = routes
    if origins:
        application = CORSMiddleware(
            application, allow_origins=list(origins), allow_methods=["GET", "POST"], allow_headers=["*"]
        )
    return Guard(application, key=key, local_only=local_only, origins=origins, measures=measures)
