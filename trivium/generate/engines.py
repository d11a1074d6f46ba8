"""Which engine generates: ours, vLLM, or a model behind an endpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, field_validator, model_validator

from trivium.generate.endpoint import EndpointSettings
from trivium.generate.endpoint_engine import EndpointEngine
from trivium.generate.requests import GenerationEngine
from trivium.generate.vllm_engine import VllmEngine, check_vllm
from trivium.kit.settings import Settings
from trivium.tokens.tokenizer import Tokenizer


class EngineSettings(Settings):
    """An engine, by its kind and what that kind has to be told."""

    kind: Literal["own", "vllm", "endpoint"] = "own"
    """`own`, `vllm` (a GPU; pip install vllm), or `endpoint`: a server with OpenAI's protocol."""
    url: str | None = None
    """Of an endpoint: its address up to `/v1`."""
    model: str | None = None
    """Of an endpoint: what the model is called there; it has to have the tokenizer of `from`."""
    key_env: str | None = None
    """Of an endpoint: the environment variable that holds the key."""
    settings: dict[str, Any] = {}
    """Of vLLM: further arguments of `vllm.LLM`; of an endpoint: further settings, as `concurrency`."""

    @field_validator("url")
    @classmethod
    def _is_address(cls, url: str | None) -> str | None:
        return None if url is None else EndpointSettings(url=url, model="any").url

    @model_validator(mode="after")
    def _fits_its_kind(self) -> EngineSettings:
        named = [name for name in ("url", "model", "key_env") if getattr(self, name) is not None]
        if self.kind == "endpoint" and not {"url", "model"} <= set(named):
            raise ValueError("`engine: {kind: endpoint}` needs a `url` and a `model`")
        if self.kind != "endpoint" and named:
            raise ValueError(f"`{named[0]}` belongs to `engine: {{kind: endpoint}}`")
        if self.kind == "endpoint":
            self.endpoint()
        return self

    def check_machine(self) -> None:
        """Whether this machine has what the engine needs; one sentence on what is missing."""
        if self.kind == "vllm":
            check_vllm()
        elif self.kind == "endpoint":
            self.endpoint().key()

    def endpoint(self) -> EndpointSettings:
        """The endpoint's own settings."""
        return EndpointSettings(
            url=self.url or "", model=self.model or "", key_env=self.key_env, **self.settings
        )

    def open(self, folder: Path, tokenizer: Tokenizer, window: int) -> GenerationEngine | None:
        """The engine for a model's folder; None is ours, which its caller makes with the model."""
        if self.kind == "endpoint":
            return EndpointEngine(self.endpoint(), tokenizer, window)
        return VllmEngine(folder, tokenizer, window, **self.settings) if self.kind == "vllm" else None


def _by_name(value: Any) -> Any:
    """`vllm` is short for `{kind: vllm}`."""
    return {"kind": value} if isinstance(value, str) else value


EngineChoice = Annotated[
    EngineSettings, BeforeValidator(_by_name, json_schema_input_type=str | EngineSettings)
]
"""The setting `engine` of a stage that generates."""
