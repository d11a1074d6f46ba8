"""The engine's interface over an endpoint: prompt ids go out through `/v1/completions`, texts come back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

from trivium.generate.endpoint import Endpoint, EndpointSettings
from trivium.generate.requests import Completion, FinishReason, Request, Scores, Texts
from trivium.generate.sampling import seed_of_sample
from trivium.kit.errors import TriviumError
from trivium.tokens.tokenizer import Tokenizer


class EndpointEngine:
    """A model that a server has, with a tokenizer and a window that are known here."""

    def __init__(self, settings: EndpointSettings, tokenizer: Tokenizer, window: int) -> None:
        self.tokenizer, self.window = tokenizer, window
        self.endpoint = Endpoint(settings)

    def generate(self, requests: Sequence[Request]) -> list[list[Completion]]:
        """The completions of each request, in the order of its samples; each sample is asked for alone."""
        jobs = [(request, sample) for request in requests for sample in range(request.n)]
        with ThreadPoolExecutor(self.endpoint.settings.concurrency) as pool:
            found = iter(list(pool.map(lambda job: self._sample(*job), jobs)))
        return [[next(found) for _ in range(request.n)] for request in requests]

    def score(
        self, prompts: Texts, completions: Texts, *, top: int = 0, adapter: str | None = None
    ) -> list[Scores]:
        """The log-probability of every token after its prompt, where the server echoes what it is given."""
        if top or adapter is not None:
            raise TriviumError(
                "An endpoint gives the log-probabilities of a text's own tokens alone; use our engine."
            )
        pairs = list(zip(prompts, completions, strict=True))
        with ThreadPoolExecutor(self.endpoint.settings.concurrency) as pool:
            return list(pool.map(lambda pair: self._score(*pair), pairs))

    def _sample(self, request: Request, sample: int) -> Completion:
        sampling = request.sampling
        if request.adapter is not None or request.slide is not None or request.constraint is not None:
            raise TriviumError(
                "An endpoint takes no adapter, sliding window or compiled form with a request."
            )
        if sampling.logprobs or sampling.top_logprobs:
            raise TriviumError(
                "An endpoint gives texts, and no log-probabilities of the tokens drawn; use our engine."
            )
        seed = None if sampling.seed is None else seed_of_sample(sampling.seed, sample) % 2**31
        body = {**self.endpoint.body_of(sampling), "prompt": list(request.prompt)}
        if seed is not None:
            body["seed"] = seed
        text, finish = self._asked(body, len(request.prompt) + sampling.max_new_tokens, _read_text)
        tokens = self.tokenizer.encode(text)
        if finish == "stop" and not sampling.stop:
            # A server does not return the token that ends an answer.
            tokens = [*tokens, self.tokenizer.end_of_reply_id]
        reason = cast(FinishReason, finish if finish in ("stop", "length") else "stop")
        return Completion(text, tokens, [], reason, len(request.prompt))

    def _score(self, prompt: Sequence[int], completion: Sequence[int]) -> Scores:
        ids = [*prompt, *completion]
        body = {"prompt": ids, "max_tokens": 1, "temperature": 0, "echo": True, "logprobs": 1}
        found = self._asked(body, len(ids) + 1, _read_logprobs)
        if len(found) < len(ids):
            raise TriviumError(
                f"{self.endpoint.settings.url} does not give the log-probabilities of prompts (`echo` with "
                "`logprobs`); use our engine."
            )
        return Scores([float(one) for one in found[max(len(prompt), 1) : len(ids)]], [])

    def _asked(self, body: Mapping[str, Any], bound: int, read: Any) -> Any:
        found, failure = self.endpoint.completions(body, bound, read)
        if found is None:
            raise TriviumError(f"{self.endpoint.settings.url}: {failure}; ask again later or elsewhere.")
        return found


def _read_text(content: Any) -> tuple[str, str]:
    choice = content["choices"][0]
    if not isinstance(choice["text"], str):
        raise TypeError("its text is no text")
    return choice["text"], str(choice.get("finish_reason") or "stop")


def _read_logprobs(content: Any) -> list[float | None]:
    found: list[float | None] = content["choices"][0]["logprobs"]["token_logprobs"]
    return found
