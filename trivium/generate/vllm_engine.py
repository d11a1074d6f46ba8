"""The engine's interface over vLLM, which is imported where it is asked for and nowhere else.

Every call was compared with the signatures of vLLM 0.32.0 (`tests/fake_vllm.py` has them and compares them
with an installed vLLM). In reinforcement learning the trainer writes its weights to a folder, under the names
that Hugging Face gives them, and every worker reads that folder again (`reload_weights`): so it is the same
call whatever processes and GPUs vLLM divides the model among.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trivium.generate.requests import Completion, Request, Scores, Texts
from trivium.generate.sampling import Sampling, seed_of_sample
from trivium.kit.errors import TriviumError
from trivium.kit.machine import ALLOCATOR, GROWING_SEGMENTS
from trivium.tokens.tokenizer import Tokenizer


def check_vllm() -> None:
    """Refuse a machine without vLLM, in one sentence, before anything is computed."""
    if importlib.util.find_spec("vllm") is None:
        raise TriviumError("`engine: vllm` needs vLLM and a GPU: pip install vllm, or leave the setting out.")


class VllmEngine:
    """A Hugging Face folder in vLLM."""

    def __init__(self, folder: Path, tokenizer: Tokenizer, window: int, **settings: Any) -> None:
        check_vllm()
        self._may_sleep = bool(settings.get("enable_sleep_mode"))
        if self._may_sleep and os.environ.get(ALLOCATOR) == GROWING_SEGMENTS:
            # What vLLM lays aside in its sleep cannot lie in segments that grow.
            del os.environ[ALLOCATOR]
        import vllm

        self._vllm: Any = vllm
        self.tokenizer, self.window = tokenizer, window
        # `processed`: log-probabilities under temperature and filters, as ours are.
        self._model = vllm.LLM(model=str(folder), logprobs_mode="processed_logprobs", **settings)
        self._asleep: list[str] = []

    def generate(self, requests: Sequence[Request]) -> list[list[Completion]]:
        if any(one.adapter is not None or one.slide is not None for one in requests):
            raise TriviumError("`engine: vllm` takes no adapter and no sliding window with a request.")
        # Each sample by itself, so that it has the seed that our engine gives it.
        jobs = [(request, sample) for request in requests for sample in range(request.n)]
        outputs = self._outputs(
            [request.prompt for request, _ in jobs],
            [self._sampling(request.sampling, sample) for request, sample in jobs],
        )
        found = iter([self._completion(request, output) for (request, _), output in zip(jobs, outputs)])
        return [[next(found) for _ in range(request.n)] for request in requests]

    def score(
        self, prompts: Texts, completions: Texts, *, top: int = 0, adapter: str | None = None
    ) -> list[Scores]:
        if adapter is not None:
            raise TriviumError("`engine: vllm` scores with the model alone, not with an adapter.")
        texts = [[*prompt, *completion] for prompt, completion in zip(prompts, completions, strict=True)]
        asked = self._vllm.SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=max(top, 1))
        outputs = self._outputs(texts, [asked] * len(texts))
        scores = []
        for prompt, text, output in zip(prompts, texts, outputs, strict=True):
            places = range(max(len(prompt), 1), len(text))
            given = [
                {token: one.logprob for token, one in output.prompt_logprobs[at].items()} for at in places
            ]
            own = [row[text[at]] for row, at in zip(given, places, strict=True)]
            scores.append(Scores(own, given if top else []))
        return scores

    def load_weights(self, folder: Path) -> None:
        """Take the weights of a folder of the same model, and forget what was computed with the old ones."""
        self._wake("weights")
        self._model.collective_rpc("reload_weights", kwargs={"weights_path": str(folder)})
        self._wake("kv_cache")
        if not self._model.reset_prefix_cache():
            raise TriviumError(
                "vLLM keeps prompts that it computed with earlier weights: give it "
                "`engine: {kind: vllm, settings: {enable_prefix_caching: false}}`."
            )

    def sleep(self) -> None:
        """Leave the GPU's memory to the trainer, where `enable_sleep_mode` lets vLLM do so."""
        if self._may_sleep:
            # Level 1 keeps the weights in the machine's memory; the cache is dropped.
            self._model.sleep(level=1)
            self._asleep = ["weights", "kv_cache"]

    def _wake(self, *parts: str) -> None:
        if tags := [part for part in parts if part in self._asleep]:
            self._model.wake_up(tags=tags)
            self._asleep = [part for part in self._asleep if part not in tags]

    def _outputs(self, prompts: Sequence[Sequence[int]], sampling: list[Any]) -> list[Any]:
        self._wake("weights", "kv_cache")
        found: list[Any] = self._model.generate(
            [{"prompt_token_ids": list(prompt)} for prompt in prompts], sampling, use_tqdm=False
        )
        return found

    def _sampling(self, sampling: Sampling, sample: int) -> Any:
        if sampling.typical_p < 1 or sampling.json_schema is not None or sampling.regex is not None:
            raise TriviumError(
                "`engine: vllm` takes no `typical_p`, `json_schema` or `regex`; use our engine."
            )
        if sampling.top_logprobs and (sampling.filtered or sampling.temperature not in (0, 1)):
            raise TriviumError(
                "`engine: vllm` gives other likely tokens under temperature and filters only; use our engine."
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
            # Else vLLM also stops at what generation_config.json names.
            ignore_eos=True,
            stop_token_ids=ends,
            logprobs=max(sampling.top_logprobs, 1) if sampling.logprobs or sampling.top_logprobs else None,
        )

    def _completion(self, request: Request, output: Any) -> Completion:
        [one] = output.outputs
        tokens, sampling = list(one.token_ids), request.sampling
        rows = [{token: entry.logprob for token, entry in row.items()} for row in one.logprobs or []]
        own = [row[token] for row, token in zip(rows, tokens, strict=bool(rows))]
        # vLLM leaves control tokens out of its text; ours keeps them, and reads tool calls from them.
        ends = self.tokenizer.stop_ids if sampling.stop_ids is None else sampling.stop_ids
        text = self.tokenizer.decode(tokens[:-1] if tokens and tokens[-1] in ends else tokens)
        for stop in sampling.stop:
            text = text.split(stop)[0]
        return Completion(
            text, tokens, own if sampling.logprobs else [],
            "length" if one.finish_reason == "length" else "stop", len(request.prompt),
            rows if sampling.top_logprobs else [],
        )  # fmt: skip
