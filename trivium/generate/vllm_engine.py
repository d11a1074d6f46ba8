"""The engine's interface over vLLM, which is imported where it is asked for and nowhere else."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trivium.generate.requests import Completion, Request, Scores
from trivium.generate.sampling import Sampling, seed_of_sample
from trivium.kit.errors import TriviumError
from trivium.tokens.tokenizer import Tokenizer


class VllmEngine:
    """A Hugging Face folder in vLLM."""

    def __init__(self, folder: Path, tokenizer: Tokenizer, window: int, **settings: Any) -> None:
        try:
            import vllm
        except ImportError as error:
            raise TriviumError(
                "`engine: vllm` needs vLLM and a GPU: pip install vllm, or leave the setting out."
            ) from error
        self._vllm: Any = vllm
        self.tokenizer, self.window = tokenizer, window
        # Under temperature and filters, as ours are.
        self._model = vllm.LLM(
            model=str(folder), skip_tokenizer_init=False, logprobs_mode="processed_logprobs", **settings
        )

    def generate(self, requests: Sequence[Request]) -> list[list[Completion]]:
        if any(one.adapter is not None or one.slide is not None for one in requests):
            raise TriviumError("`engine: vllm` takes no adapter and no sliding window with a request.")
        # Each sample by itself, so that it has the seed that our engine gives it.
        jobs = [(request, sample) for request in requests for sample in range(request.n)]
        outputs = self._model.generate(
            [{"prompt_token_ids": list(request.prompt)} for request, _ in jobs],
            [self._sampling(request.sampling, sample) for request, sample in jobs],
            use_tqdm=False,
        )
        found = iter([_completion(request, output) for (request, _), output in zip(jobs, outputs)])
        return [[next(found) for _ in range(request.n)] for request in requests]

    def score(
        self,
        prompts: Sequence[Sequence[int]],
        completions: Sequence[Sequence[int]],
        *,
        top: int = 0,
        adapter: str | None = None,
    ) -> list[Scores]:
        if adapter is not None:
            raise TriviumError("`engine: vllm` scores with the model alone, not with an adapter.")
        texts = [[*prompt, *completion] for prompt, completion in zip(prompts, completions, strict=True)]
        outputs = self._model.generate(
            [{"prompt_token_ids": text} for text in texts],
            self._vllm.SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=max(top, 1)),
            use_tqdm=False,
        )
        scores = []
        for prompt, text, output in zip(prompts, texts, outputs, strict=True):
            places = range(max(len(prompt), 1), len(text))
            given = [
                {token: one.logprob for token, one in output.prompt_logprobs[at].items()} for at in places
            ]
            own = [row[text[at]] for row, at in zip(given, places, strict=True)]
            scores.append(Scores(own, given if top else []))
        return scores

    def _sampling(self, sampling: Sampling, sample: int) -> Any:
        if sampling.typical_p < 1 or sampling.json_schema is not None or sampling.regex is not None:
            raise TriviumError(
                "`engine: vllm` takes no `typical_p`, `json_schema` or `regex`; use our engine."
            )
        ends = sorted(self.tokenizer.stop_ids) if sampling.stop_ids is None else list(sampling.stop_ids)
        return self._vllm.SamplingParams(
            n=1,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            # vLLM keeps every token at -1 or 0, depending on the version; -1 is known to all.
            top_k=sampling.top_k or -1,
            min_p=sampling.min_p,
            repetition_penalty=sampling.repetition_penalty,
            presence_penalty=sampling.presence_penalty,
            frequency_penalty=sampling.frequency_penalty,
            logit_bias=dict(sampling.logit_bias) or None,
            seed=None if sampling.seed is None else seed_of_sample(sampling.seed, sample) % 2**31,
            max_tokens=sampling.max_new_tokens,
            min_tokens=sampling.min_new_tokens,
            stop=list(sampling.stop) or None,
            stop_token_ids=ends,
            logprobs=max(sampling.top_logprobs, 1) if sampling.logprobs or sampling.top_logprobs else None,
        )


def _completion(request: Request, output: Any) -> Completion:
    one = output.outputs[0]
    tokens = list(one.token_ids)
    rows = [{token: entry.logprob for token, entry in row.items()} for row in one.logprobs or []]
    own = [row[token] for row, token in zip(rows, tokens, strict=False)]
    return Completion(
        one.text, tokens, own if request.sampling.logprobs else [],
        "length" if one.finish_reason == "length" else "stop", len(request.prompt),
        rows if request.sampling.top_logprobs else [],
    )  # fmt: skip
