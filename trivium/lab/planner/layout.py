"""How a training is spread over devices, and what the devices then have to tell each other.

data      whole copies of the model: gradients are summed, 2 x 4 bytes a weight and step
shard     weights, gradients and moments in parts (FSDP), over `context` too: gathered twice a pass
tensor    every matrix in parts, with sequence-parallel norms: four messages a layer each way
context   every document in parts: keys and values travel, once a layer
expert    a mixture's experts in parts, by `data` or `shard`: tokens travel there and back, four times a layer
pipeline  layers in groups, one after the other: (p - 1) / (m + p - 1) of the time is waiting
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from trivium.lab.planner.catalogue import Machine
from trivium.lab.planner.work import Job
from trivium.model.recompute import Recompute

HIDDEN_ASYNC = 0.5
"""The share of tensor-parallel messages that asynchronous products hide."""
HIDDEN_SHARD = 0.97
"""The share of gathering and scattering that hides behind the products, as long as those last longer."""
MOST_STAGES = 16
"""The longest pipeline that is proposed; a recipe may say a longer one."""
LONG = 16384
"""From this context on the tokens of a pass may be divided."""


@dataclass(frozen=True)
class Layout:
    """Degrees whose product is the number of devices, and how large a pass is."""

    data: int = 1
    shard: int = 1
    tensor: int = 1
    context: int = 1
    pipeline: int = 1
    expert: int = 1
    """Among how many devices of `data`, or of `shard`, a mixture's experts are divided."""
    micro_batch: float = 0.0
    """Tokens of a pass of one group of `tensor` x `context` devices."""
    recompute: Recompute = "none"
    micro_batches: float = 1.0
    """Passes of an optimiser step."""
    chunks: int = 1
    """Groups of layers that a device of a pipeline holds (interleaved)."""
    asynchronous: bool = False

    @property
    def devices(self) -> int:
        return self.data * self.shard * self.tensor * self.context * self.pipeline

    @property
    def sharded(self) -> int:
        """Over how many devices weights and their state are spread besides tensor and pipeline."""
        return self.shard * self.context

    @property
    def in_flight(self) -> float:
        """How many passes' activations the first stage of a pipeline holds."""
        if self.pipeline == 1:
            return 1.0
        # Interleaved, a device holds groups of layers of passes that come round again.
        more = (self.pipeline - 1) / self.chunks if self.chunks > 1 else 0.0
        return min(self.micro_batches, self.pipeline + more)

    @property
    def bubble(self) -> float:
        """The share of the time in which a pipeline waits."""
        if self.pipeline == 1:
            return 0.0
        waits = self.pipeline - 1
        return waits / (self.micro_batches * self.chunks + waits)

    def described(self) -> str:
        """Such as `shard 32 x tensor 8, full recompute`."""
        names = ("data", "shard", "tensor", "context", "pipeline", "expert")
        parts = [f"{name} {getattr(self, name)}" for name in names if getattr(self, name) > 1]
        text = " x ".join(parts) or "one device"
        return text if self.recompute == "none" else f"{text}, {self.recompute} recompute"

    def as_json(self) -> dict[str, object]:
        return {
            "data": self.data, "shard": self.shard, "tensor": self.tensor, "context": self.context,
            "pipeline": self.pipeline, "expert": self.expert, "micro_batch": round(self.micro_batch),
            "micro_batches": self.micro_batches, "recompute": self.recompute,
        }  # fmt: skip


def passed_share(job: Job, layout: Layout) -> float:
    """The share of the weights that a device computes with: of experts those that its group leaves to it."""
    if layout.expert == 1 or not job.parameters:
        return 1.0
    return 1.0 - job.expert_parameters * (1 - 1 / layout.expert) / job.parameters


def held_share(job: Job, layout: Layout) -> float:
    """The share of the weights that a device keeps between passes."""
    share = passed_share(job, layout) if layout.sharded == 1 else 1 / layout.sharded
    return share / (layout.tensor * layout.pipeline)


def communication_seconds(job: Job, machine: Machine, layout: Layout, compute: float) -> float:
    """What the messages of one optimiser step add to `compute` seconds of products."""
    assert job.config is not None
    config, product = job.config, 2 if machine.precision != "float32" else 4
    tokens = job.batch / (layout.data * layout.shard)
    layers = config.layers / layout.pipeline
    fast, slow = machine.inside * machine.copy, machine.between * machine.copy
    group = layout.tensor * layout.context
    exposed = 0.0
    if layout.tensor > 1:
        share = (layout.tensor - 1) / layout.tensor
        messages = 12 if layout.recompute == "full" else 8
        seconds = messages * layers * tokens / layout.context * config.width * product * share / fast
        exposed += seconds * (1 - HIDDEN_ASYNC if layout.asynchronous else 1)
    if layout.context > 1:
        keys = 2 * config.key_value_heads * config.head_width / layout.tensor
        link = fast if group <= machine.node else slow
        exposed += 3 * layers * tokens * keys * product / link
    if layout.expert > 1:
        assert config.experts is not None
        mixtures = sum(config.is_mixture(layer) for layer in range(config.layers))
        messages = 6 if layout.recompute == "full" else 4
        sent = tokens * config.experts.per_token * config.width * product * (1 - 1 / layout.expert)
        exposed += messages * mixtures * sent / (fast if layout.expert <= machine.node else slow)
    part = passed_share(job, layout)
    own = part * job.trained_parameters / (layout.tensor * layout.pipeline)
    # Devices of a node that hold different parts pass on what comes from other nodes over the fast links.
    rails = max(1, machine.node // max(1, layout.tensor))
    wide = min(fast, slow * rails)
    if layout.sharded > 1:
        whole = part * job.parameters / (layout.tensor * layout.pipeline)
        gathers = 1 if layout.pipeline > 1 else 2 * layout.micro_batches
        scatters = 1 if layout.pipeline > 1 else layout.micro_batches
        inside = layout.sharded * layout.tensor <= machine.node
        seconds = (gathers * product * whole + scatters * 4 * own) / (fast if inside else wide)
        exposed += (1 - HIDDEN_SHARD) * seconds + max(0.0, seconds - compute)
    if layout.data > 1:
        local = layout.data * layout.sharded * layout.tensor <= machine.node
        share = 2 * (layout.data - 1) / layout.data
        exposed += share * 4 * held_share(job, layout) * job.trained_parameters / (fast if local else wide)
    if layout.pipeline > 1:
        exposed += 2 * tokens / layout.context * config.width * product / layout.tensor / slow
    return exposed


def candidates(job: Job, devices: int, node: int) -> Iterator[Layout]:
    """All layouts of so many devices that a training can have, each with every recompute and size of a pass.

    What the recipe says is kept to.
    """
    rows = max(1, int(job.batch // max(1, job.context)))
    # In a world of one nothing is shared.
    wish = job.parallel if devices > 1 else None
    said = None if wish is None else [(wish.tensor, wish.context, wish.pipeline)]
    for tensor, context, pipeline in said or _groups(job, devices, node):
        left, rest = divmod(devices, tensor * context * pipeline)
        if rest or left > rows:
            continue
        shard = "auto" if wish is None else wish.shard
        wished = {1, left, min(left, node)} if shard == "auto" else {left if shard == "all" else shard}
        group = tensor * context * pipeline
        among = _experts(job, min(left, node), group) if wish is None else [wish.expert]
        for shard in wished:
            for expert in among:
                if left % shard == 0 and (left if shard == 1 else shard) % expert == 0:
                    layout = Layout(left // shard, shard, tensor, context, pipeline, expert=expert)
                    yield from _passes(job, layout, rows)


def _experts(job: Job, most: int, group: int) -> Iterator[int]:
    """Among how many devices a mixture's experts can be divided; groups that share passes divide none."""
    assert job.config is not None
    experts = job.config.experts
    for many in _powers(1 if experts is None or group > 1 else most):
        if experts is None or experts.count % many == 0:
            yield many


def _groups(job: Job, devices: int, node: int) -> Iterator[tuple[int, int, int]]:
    """How many processes compute a pass together: by matrices, by tokens, or by layers."""
    assert job.config is not None
    config = job.config
    inner = config.inner_width if config.experts is None else config.experts.inner_width
    is_long = job.context >= LONG and job.divisible and not job.shares_prompts
    divides = job.divisible and not job.float8
    for tensor in _powers(min(node, devices, config.key_value_heads) if divides else 1):
        if not any(one % tensor for one in (config.heads, config.key_value_heads, inner)):
            for context in _powers(min(64, devices // tensor) if is_long else 1):
                yield tensor, context, 1
    has_stages = job.divisible and config.experts is None
    for pipeline in _powers(min(MOST_STAGES, devices, config.layers) if has_stages else 1):
        if pipeline > 1:
            yield 1, 1, pipeline


def _passes(job: Job, layout: Layout, rows: int) -> Iterator[Layout]:
    """The sizes that a pass may have: a row, or several."""
    mine = rows // (layout.data * layout.shard)
    for many in _powers(mine):
        for recompute in ("none", "selective", "full"):
            yield replace(
                layout, micro_batch=float(many * job.context), micro_batches=float(-(-mine // many)),
                recompute=recompute,  # type: ignore[arg-type]
                chunks=1,
            )  # fmt: skip


def _powers(most: int) -> Iterator[int]:
    power = 1
    while power <= most:
        yield power
        power *= 2
