"""vLLM's offline entrance, played by our engine, since vLLM itself needs a machine of its own.

Every signature is vLLM 0.32.0's, argument for argument, and nothing takes arguments that it does not name: a
call that vLLM would refuse is refused here. `python tests/fake_vllm.py` compares them with an installed vLLM.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

from trivium.generate.engine import Engine
from trivium.generate.requests import Request
from trivium.generate.sampling import Sampling
from trivium.model.folder import load_model
from trivium.tokens.tokenizer import Tokenizer

ENGINE_ARGUMENTS = {
    "enable_prefix_caching", "enable_sleep_mode", "load_format", "logprobs_mode", "max_logprobs",
    "max_model_len", "max_num_batched_tokens", "max_num_seqs", "pipeline_parallel_size",
}  # fmt: skip
"""Some fields of `EngineArgs`, to which `LLM` passes what it does not name itself."""
TAGS = ("weights", "kv_cache")


class SamplingParams:
    """The fields of vLLM's that are an input."""

    def __init__(
        self, n: int = 1, presence_penalty: float = 0.0, frequency_penalty: float = 0.0,
        repetition_penalty: float = 1.0, temperature: float = 1.0, watermarking: bool | None = None,
        top_p: float = 1.0, top_k: int = 0, min_p: float = 0.0, seed: int | None = None,
        stop: str | list[str] | None = None, stop_token_ids: list[int] | None = None,
        ignore_eos: bool = False, max_tokens: int | None = 16, min_tokens: int = 0,
        logprobs: int | None = None, prompt_logprobs: int | None = None,
        logit_bias: dict[int, float] | None = None,
    ) -> None:  # fmt: skip
        vars(self).update({name: value for name, value in locals().items() if name != "self"})


class LLM:
    """vLLM's engine over ours; `dtype` rounds the weights, as vLLM would."""

    def __init__(
        self, model: str, *, tokenizer: str | None = None, skip_tokenizer_init: bool = False,
        tensor_parallel_size: int = 1, dtype: str = "auto", seed: int = 0,
        gpu_memory_utilization: float = 0.92, enforce_eager: bool = False, **kwargs: Any,
    ) -> None:  # fmt: skip
        assert set(kwargs) <= ENGINE_ARGUMENTS, kwargs
        assert kwargs["logprobs_mode"] == "processed_logprobs"
        self.dtype = None if dtype == "auto" else getattr(torch, dtype)
        self.may_sleep = kwargs.get("enable_sleep_mode", False)
        self.asleep: set[str] = set()
        self.calls: list[str] = []
        self.engine = self._opened(model)

    def _opened(self, folder: str) -> Engine:
        model = load_model(Path(folder), dtype=self.dtype)
        return Engine(model.float() if self.dtype else model, Tokenizer.load(folder), seed=0)

    def generate(
        self, prompts: list[dict[str, Any]], sampling_params: Any = None, *,
        use_tqdm: bool | Callable[..., Any] = True, lora_request: Any = None,
        priority: int | Sequence[int] | None = None, tokenization_kwargs: dict[str, Any] | None = None,
        mm_processor_kwargs: dict[str, Any] | None = None,
    ) -> list[Any]:  # fmt: skip
        assert not self.asleep, "asked while it sleeps"
        self.calls.append("generate")
        asked = [one["prompt_token_ids"] for one in prompts]
        assert isinstance(sampling_params, list)
        return [self._one(ids, wanted) for ids, wanted in zip(asked, sampling_params, strict=True)]

    def collective_rpc(
        self, method: str, timeout: float | None = None, args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> list[Any]:  # fmt: skip
        self.calls.append(method)
        return [getattr(Worker(self), method)(*args, **(kwargs or {}))]

    def reset_prefix_cache(self, reset_running_requests: bool = False, reset_connector: bool = False) -> bool:
        self.calls.append("reset_prefix_cache")
        return True

    def sleep(self, level: int = 1, mode: str = "abort") -> None:
        assert self.may_sleep
        self.calls.append("sleep")
        self.asleep = set(TAGS)

    def wake_up(self, tags: list[str] | None = None) -> bool:
        assert self.may_sleep
        assert set(tags or TAGS) <= self.asleep
        self.calls.append(f"wake_up {' '.join(tags or TAGS)}")
        self.asleep -= set(tags or TAGS)
        return not self.asleep

    def _one(self, ids: list[int], wanted: SamplingParams) -> Any:
        sampling = Sampling(
            temperature=wanted.temperature, top_p=wanted.top_p, top_k=max(wanted.top_k, 0),
            min_p=wanted.min_p, seed=wanted.seed, max_new_tokens=wanted.max_tokens or 1,
            min_new_tokens=wanted.min_tokens,
            stop_ids=tuple(wanted.stop_token_ids or ()), stop=tuple(wanted.stop or ()),
            logprobs=wanted.logprobs is not None,
        )  # fmt: skip
        [[found]] = self.engine.generate([Request(ids, sampling)])
        rows = [{token: SimpleNamespace(logprob=value)} for token, value in zip(found.tokens, found.logprobs)]
        scored = None
        if wanted.prompt_logprobs is not None:
            [scores] = self.engine.score([[]], [ids], top=wanted.prompt_logprobs)
            given = [
                {token: SimpleNamespace(logprob=one) for token, one in row.items()}
                for row in scores.top_logprobs
            ]
            scored = [None, *given]
        # vLLM's own text leaves control tokens out; the adapter reads the tokens.
        one = SimpleNamespace(
            text=None, token_ids=tuple(found.tokens), logprobs=rows or None, finish_reason=found.finish_reason
        )
        return SimpleNamespace(outputs=[one], prompt_logprobs=scored)


class Worker:
    """What `collective_rpc` reaches: the model runner's methods."""

    def __init__(self, llm: LLM) -> None:
        self.llm = llm

    def reload_weights(
        self, weights_iterator: Any = None, weights_path: str | None = None, is_checkpoint_format: bool = True
    ) -> None:
        assert "weights" not in self.llm.asleep
        assert weights_path is not None
        self.llm.engine = self.llm._opened(weights_path)


def module() -> ModuleType:
    """What `import vllm` finds."""
    found = ModuleType("vllm")
    found.__dict__.update(LLM=LLM, SamplingParams=SamplingParams)
    # `importlib.util.find_spec` asks for it.
    found.__spec__ = SimpleNamespace(name="vllm")  # type: ignore[assignment]
    return found


def differences() -> list[str]:
    """Where the installed vLLM has no such argument, or another default."""
    import dataclasses

    import vllm
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    pairs = [(LLM.__init__, vllm.LLM.__init__), (SamplingParams.__init__, vllm.SamplingParams)]
    pairs += [
        (getattr(LLM, name), getattr(vllm.LLM, name))
        for name in ("generate", "collective_rpc", "reset_prefix_cache", "sleep", "wake_up")
    ]
    pairs.append((Worker.reload_weights, GPUModelRunner.reload_weights))
    found = []
    for ours, theirs in pairs:
        real = inspect.signature(theirs).parameters
        for name, one in inspect.signature(ours).parameters.items():
            if name in ("self", "kwargs"):
                continue
            if name not in real:
                found.append(f"{theirs.__qualname__} has no {name}")
            elif real[name].default != one.default:
                found.append(f"{theirs.__qualname__}: {name} is {real[name].default!r} by default")
    fields = {one.name for one in dataclasses.fields(EngineArgs)}
    return found + [f"EngineArgs has no {name}" for name in ENGINE_ARGUMENTS - fields]


if __name__ == "__main__":
    print("\n".join(differences()) or "every signature is the installed vLLM's")
