"""The memory of one device, by part, under a layout.

    weights      float32 masters, spread over `shard`, `tensor` and `pipeline`; what is gathered for a pass
    gradients    float32, alike; under a pipeline the whole gradient of a stage waits for the last micro-batch
    optimiser    one moment for Muon's matrices, two for AdamW's weights, float32
    activations  what the backward pass needs of a pass's tokens, with what one layer holds while it works
    cache        keys and values of all rows that are generated at once
    logits       a chunk of tokens x vocabulary, or all of it, with its gradient
    runtime      the process, its libraries and the allocator's gaps

Activations per layer and token: a dense layer of width d with H query and K key-value heads of width D and an
inner width F keeps about 5d + 2HD + 2KD + 3F numbers; `selective` keeps its input, attention's output and
every other product (2d + 2HD + KD + F); `full` keeps its input alone. Under tensor parallelism with sequence
parallel norms all of them are divided by the degree.
"""

from dataclasses import asdict, dataclass

from trivium.generate.prefill import CHUNK
from trivium.lab.planner.catalogue import Machine
from trivium.lab.planner.layout import Layout, held_share, passed_share
from trivium.lab.planner.work import Job
from trivium.learn.head_loss import CACHE_BYTES, DEVICE_BYTES
from trivium.learn.validation import PASS_TOKENS
from trivium.model.config import ModelConfig
from trivium.model.recompute import Recompute

MASTER = 4
"""Bytes of a weight, a gradient and a moment."""
LOGIT_BYTES = 12
"""Of a score that is not chunked: in the products' type and float32, and the gradient of both."""


@dataclass(frozen=True)
class Memory:
    """Bytes on one device."""

    weights: float = 0.0
    gradients: float = 0.0
    optimiser: float = 0.0
    activations: float = 0.0
    cache: float = 0.0
    logits: float = 0.0
    runtime: float = 0.0

    @property
    def total(self) -> float:
        return sum(asdict(self).values())


def activation_numbers(config: ModelConfig, recompute: Recompute) -> float:
    """How many numbers a layer keeps of a token for the backward pass."""
    width, queries = config.width, config.heads * config.head_width
    keys, inner = config.key_value_heads * config.head_width, _inner(config)
    if recompute == "full":
        return width
    if recompute == "selective":
        return 2 * width + 2 * queries + keys + inner
    return 5 * width + 2 * queries + 2 * keys + (3 if config.gated else 2) * inner


def _inner(config: ModelConfig) -> int:
    experts = config.experts
    return config.inner_width if experts is None else experts.inner_width * experts.per_token


def _moments(job: Job) -> float:
    """Moments of a trained weight: Muon keeps one of the layers' matrices, and AdamW two of the tables."""
    if job.optimiser != "muon" or not job.parameters:
        return 2.0
    return 2.0 - _layer_weights(job) / job.parameters


def memory_of(job: Job, machine: Machine, layout: Layout) -> Memory:
    """What one device holds at the worst moment of a stage."""
    if job.config is None:
        return Memory(runtime=machine.runtime)
    config, product = job.config, 4 if machine.precision == "float32" else 2
    own = held_share(job, layout)
    stage = 1 / (layout.tensor * layout.pipeline)
    weights = MASTER * job.parameters * own * (1 + job.copies)
    gradients = MASTER * job.trained_parameters * own
    tables = job.parameters - _layer_weights(job)
    optimiser = MASTER * job.trained_parameters * own * _moments(job)
    if layout.sharded > 1:
        # Two layers are gathered at a time, and embedding and head as long as a pass lasts.
        layers = passed_share(job, layout) * job.parameters - tables
        gathered = 2 * layers / config.layers / layout.tensor + tables / layout.tensor
        if layout.pipeline > 1:
            gathered = job.parameters * stage
            gradients += MASTER * job.trained_parameters * stage
        weights += product * gathered
    activations = logits = cache = 0.0
    if job.trained_parameters:
        per_layer = product * activation_numbers(config, layout.recompute) / layout.tensor
        worked = product * activation_numbers(config, "none") / layout.tensor
        tokens = layout.micro_batch / layout.context
        layers = -(-config.layers // layout.pipeline)
        activations = tokens * (per_layer * layers * layout.in_flight + 2 * worked)
        if layout.tensor > 1:
            activations += 2 * tokens * product * config.width
        logits, extra = _logits(job, layout, tokens, product, machine)
        gradients += extra
    elif job.phases:
        # Without a backward pass one layer's numbers are there at a time.
        passes = [min(CHUNK if one.name == "generation" else PASS_TOKENS, one.tokens) for one in job.phases]
        activations = max(passes) * product * activation_numbers(config, "none") / layout.tensor
    if job.cached_tokens:
        cache = product * 2 * config.layers * config.key_value_heads * config.head_width * job.cached_tokens
        cache /= layout.tensor * layout.pipeline * layout.data * layout.shard
        if not job.trained_parameters:
            logits = 4.0 * config.vocabulary * max((one.rows for one in job.phases), default=1.0)
    held = weights + gradients + optimiser + activations + cache + logits
    runtime = machine.runtime + machine.gaps * held + (machine.answering if cache else 0.0)
    return Memory(weights, gradients, optimiser, activations, cache, logits, runtime)


def _logits(job: Job, layout: Layout, tokens: float, product: int, machine: Machine) -> tuple[float, float]:
    """Bytes of scores, and of the head's gradient while it is made."""
    assert job.config is not None
    vocabulary = job.config.vocabulary
    if job.phases and not any(one.predicted for one in job.phases if one.trained is not None):
        # A reward model scores no tokens.
        return 0.0, 0.0
    if not job.chunked_loss:
        return LOGIT_BYTES * tokens * vocabulary / layout.tensor, 0.0
    budget = CACHE_BYTES if machine.local and product == 4 else DEVICE_BYTES
    head = 2 * MASTER * vocabulary * job.config.width / layout.tensor
    return 2.0 * budget + product * tokens * job.config.width, head


def _layer_weights(job: Job) -> float:
    """All weights but the tables of tokens."""
    assert job.config is not None
    tables = 1 if job.config.tied else 2
    return job.parameters - tables * job.config.vocabulary * job.config.width


def disk_of(job: Job) -> dict[str, float]:
    """What a stage leaves and needs on the disk: its model, its optimiser state, and states for resuming."""
    if job.config is None:
        return {"model": 0.0, "optimiser_state": 0.0, "checkpoints": 0.0}
    moments = _moments(job)
    model = MASTER * job.parameters * job.kept_models
    state = MASTER * job.trained_parameters * moments if job.trained_parameters else 0.0
    saved = MASTER * job.trained_parameters * (1 + moments)
    return {
        "model": float(model), "optimiser_state": state, "checkpoints": saved * job.kept_states
    }  # fmt: skip
