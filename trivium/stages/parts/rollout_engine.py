"""What samples completions of a model that learns: our engine on its own layers, or vLLM on its weights."""

from collections.abc import Sequence
from typing import Any, Protocol

from trivium.generate.engine import Engine
from trivium.generate.engines import EngineSettings
from trivium.generate.requests import Completion, Request
from trivium.generate.vllm_engine import VllmEngine
from trivium.kit import machine
from trivium.kit.errors import TriviumError
from trivium.kit.processes import world
from trivium.model.folder import save_model
from trivium.model.lora import merged
from trivium.model.transformer import Transformer
from trivium.stages.parts.training import Opened
from trivium.tokens.tokenizer import Tokenizer


class RolloutEngine(Protocol):
    """Samples with the weights that the model had at the last `refresh`."""

    @property
    def tokenizer(self) -> Tokenizer: ...

    def refresh(self) -> None:
        """Take over what the optimiser changed."""
        ...

    def generate(self, requests: Sequence[Request]) -> list[list[Completion]]:
        """The completions of each request, with their log-probabilities."""
        ...


class VllmRollouts:
    """vLLM, which reads the trainer's weights before every rollout, an adapter merged into them."""

    def __init__(self, opened: Opened[Any], settings: EngineSettings, max_rows: int) -> None:
        if world().size > 1:
            raise TriviumError(
                f"{opened.work.stage}: `engine: vllm` samples for a trainer of one process; start it without "
                "torchrun, or leave `engine` out."
            )
        self.model, self.tokenizer = opened.model, opened.tokenizer
        self.folder = opened.work.folder / "checkpoints" / "vllm"
        self.dtype = machine.compute_dtype(machine.device())
        self._write(self.model)
        self.tokenizer.save(self.folder)
        window = self.model.config.reach
        engine = EngineSettings(kind="vllm", settings={"max_num_seqs": max_rows, **settings.settings})
        found = engine.open(self.folder, self.tokenizer, window)
        assert isinstance(found, VllmEngine)
        self.engine = found

    def refresh(self) -> None:
        """Write the weights as they are now, and have vLLM read them."""
        self._write(self.model)
        self.engine.load_weights(self.folder)

    def generate(self, requests: Sequence[Request]) -> list[list[Completion]]:
        """Sample, and leave the GPU's memory to the training that follows."""
        found = self.engine.generate(requests)
        self.engine.sleep()
        return found

    def _write(self, model: Transformer) -> None:
        with merged(model):
            save_model(model, self.folder, dtype=self.dtype)


def refuse_endpoint(settings: EngineSettings) -> None:
    """An endpoint can neither follow the weights nor say how likely its tokens were."""
    if settings.kind == "endpoint":
        raise ValueError(
            "`engine: {kind: endpoint}` takes no new weights and gives no log-probabilities of what it drew; "
            "sample with `own` or `vllm`"
        )


def rollout_engine(opened: Opened[Any], settings: EngineSettings, max_rows: int) -> RolloutEngine:
    """The engine that a stage's setting names, over the model that it trains."""
    if settings.kind == "vllm":
        return VllmRollouts(opened, settings, max_rows)
    compiled = opened.settings.compile == "on"
    return Engine(opened.model, opened.tokenizer, max_rows=max_rows, compiled=compiled)
