"""Time, memory and money of a stage on a machine, under the best layout that fits."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from trivium.kit.errors import TriviumError
from trivium.kit.numbers import short
from trivium.lab.planner.catalogue import Machine
from trivium.lab.planner.layout import Layout, candidates, communication_seconds, held_share
from trivium.lab.planner.memory import Memory, disk_of, memory_of
from trivium.lab.planner.work import Job, Phase
from trivium.learn.pass_size import CPU_TOKENS
from trivium.model.flops import Flops, visible_keys

USABLE = 0.95
"""The share of a device's memory that a plan may fill."""
AGAIN = {"none": 0.0, "selective": 1 / 6, "full": 1 / 3}
"""What recomputing adds to a forward and backward pass: half of the forward's products, or all of them."""
UPDATE_BYTES = 28
"""Read and written for each weight by an update: weight, gradient, moments."""


@dataclass(frozen=True)
class Estimate:
    """What a stage costs."""

    job: Job
    machine: Machine
    layout: Layout
    flops: Flops
    memory: Memory
    phases: Mapping[str, Mapping[str, float]]
    """Tokens, FLOPs and seconds of generation, scoring and training."""
    seconds: float
    fits: bool
    busy: int
    """How many of the devices have something to do."""
    formula_seconds: float = 0.0
    """Before what earlier stages took corrects it."""

    @property
    def dollars(self) -> float:
        return self.machine.dollars * self.machine.devices * self.seconds / 3600

    @property
    def share(self) -> float:
        """The FLOPs, none of them counted twice, over what the devices could do in that time."""
        peak = self.machine.peak[self.machine.precision] * self.machine.devices
        return self.flops.total / (peak * self.seconds) if self.seconds else 0.0

    def as_json(self) -> dict[str, Any]:
        job = self.job
        return {
            "stage": job.stage, "kind": job.kind, "tokens": round(job.tokens), "parameters": job.parameters,
            "flops": self.flops.total, "memory_bytes": round(self.memory.total), "seconds": self.seconds,
            "formula_seconds": self.formula_seconds, "cost": self.dollars, "parallel": self.layout.as_json(),
            "flops_by_part": asdict(self.flops), "phases": {k: dict(v) for k, v in self.phases.items()},
            "memory": {name: round(value) for name, value in asdict(self.memory).items()},
            "disk": {name: round(value) for name, value in disk_of(job).items()},
            "steps": round(job.steps), "fits": self.fits, "share_of_peak": self.share,
            "advice": list(job.advice),
        }  # fmt: skip


def estimate(job: Job, machine: Machine, layout: Layout | None = None) -> Estimate:
    """The stage under this layout, else under the fastest that fits."""
    if layout is None:
        return _best(job, machine)
    flops = job.flops() if job.phases else Flops(layers=job.told)
    memory = memory_of(job, machine, layout)
    fits = memory.total <= USABLE * machine.memory or not job.parameters
    phases: dict[str, dict[str, float]] = {}
    for phase in job.phases:
        assert job.config is not None
        own = phase.flops(job.config).total
        seconds = _seconds(job, machine, layout, phase)
        before = phases.get(phase.name, {"tokens": 0.0, "flops": 0.0, "seconds": 0.0})
        spent = {"tokens": 0.0 if phase.encoder else phase.tokens, "flops": own, "seconds": seconds}
        phases[phase.name] = {key: before[key] + spent[key] for key in spent}
    if job.optimiser_flops and "training" in phases:
        phases["training"]["flops"] += job.optimiser_flops
    seconds = sum(one["seconds"] for one in phases.values())
    if job.told and not job.phases:
        width = job.config.width if job.config is not None else 1024
        rate = machine.peak[machine.precision] * machine.share(width) * layout.devices
        phases["generation"] = {"tokens": job.tokens, "flops": job.told, "seconds": job.told / rate}
        seconds = job.told / rate
    formula = seconds + job.characters / machine.read + job.conversations * machine.conversation_seconds
    # What stages of this kind took of what the formula said, where some ended here.
    times = machine.corrections.get(job.kind, 1.0)
    for one in phases.values():
        one["seconds"] *= times
    return Estimate(
        job, machine, layout, flops, memory, phases, formula * times, fits, layout.devices, formula
    )


def _seconds(job: Job, machine: Machine, layout: Layout, phase: Phase) -> float:
    """Seconds of one phase."""
    assert job.config is not None
    parts = phase.flops(job.config)
    rate = machine.peak[machine.precision] * machine.share(job.config.width, layout.tensor) * layout.devices
    if not job.compiled:
        rate /= machine.compiled
    attention = (
        parts.attention if machine.precision == "float32" else parts.attention * _seen(job, phase.length)
    )
    work = parts.layers / (machine.float8 if job.float8 else 1) + parts.head
    apart = machine.attention_rate(phase.length) if layout.devices == 1 else None
    # In the same currency as the products: what takes so long at their rate.
    work += attention if apart is None else attention * rate / apart
    if phase.name == "generation":
        replicas = layout.data * layout.shard * layout.context * layout.pipeline
        product = 4 if machine.precision == "float32" else 2
        keys = 2 * job.config.layers * job.config.key_value_heads * job.config.head_width
        memory = machine.bandwidth * machine.copy
        row = machine.row_seconds + product * phase.length * keys / layout.tensor / (
            machine.cache_rate or memory
        )
        each = machine.step_seconds + product * job.parameters / layout.tensor / memory + phase.rows * row
        beside = phase.requests * machine.request_seconds
        return (phase.decode_steps * each + beside) / replicas + work / rate
    if phase.trained is None:
        return work / rate
    work *= 1 + AGAIN[layout.recompute]
    passes = work / rate / (1 - layout.bubble)
    update = _update_seconds(job, machine, layout) * job.steps
    if layout.devices == 1 or not job.steps:
        return passes + update
    messages = communication_seconds(job, machine, layout, passes / job.steps)
    return passes + update + messages * job.steps


def _seen(job: Job, length: float) -> float:
    """The share of attention that is left where layers have a window and kernels skip what it hides."""
    config = job.config
    assert config is not None
    if not config.windows:
        return 1.0
    whole = visible_keys(max(1, int(length)), None, True)
    seen = [visible_keys(max(1, int(length)), window, True) / whole for window in config.windows]
    return sum(seen) / len(seen)


def _update_seconds(job: Job, machine: Machine, layout: Layout) -> float:
    """One optimiser step of the weights that a device owns."""
    assert job.config is not None
    own = held_share(job, layout)
    moved = UPDATE_BYTES * job.trained_parameters * own / (machine.bandwidth * machine.copy)
    rate = machine.peak[machine.precision] * machine.share(job.config.width)
    return moved + (job.optimiser_flops / job.steps * own / rate if job.steps else 0.0)


def _best(job: Job, machine: Machine) -> Estimate:
    """The fastest layout that fits; where none does, the one that needs the least memory."""
    if job.config is None or not job.trained_parameters:
        tensor = 1
        while True:
            layout = Layout(data=max(1, machine.devices // tensor), tensor=tensor)
            found = estimate(job, machine, layout)
            wider = 2 * tensor
            if found.fits or wider > min(machine.node, machine.devices) or job.config is None:
                return found
            tensor = wider
    if machine.local and machine.devices == 1:
        return _here(job, machine)
    best: Estimate | None = None
    busy = machine.devices
    while busy:
        tried = _fastest(job, machine, busy)
        if tried is None and job.parallel is not None:
            raise TriviumError(
                f"{job.stage}: `parallel` ({job.parallel.described() or 'auto'}) is not possible on {busy} "
                f"devices with steps of {short(job.batch)} tokens: its numbers have to divide the devices, "
                "and every group needs a row."
            )
        if best is not None and (tried is None or (tried.fits, -tried.seconds) <= (best.fits, -best.seconds)):
            break
        best = tried
        if job.parallel is not None:
            break
        # A batch of few rows keeps few devices busy, and what more of them tell each other only takes time.
        busy //= 2
    assert best is not None
    return best


def _fastest(job: Job, machine: Machine, devices: int) -> Estimate | None:
    """The fastest layout of so many devices that fits, else the one that needs the least memory."""
    tried = [estimate(job, machine, one) for one in candidates(job, devices, machine.node)]
    fitting = [one for one in tried if one.fits]
    if not fitting:
        return min(tried, key=lambda one: one.memory.total, default=None)
    # Of layouts that are equally fast, to half a percent, the simplest, and that which does less twice.
    fastest = min(one.seconds for one in fitting)
    close = [one for one in fitting if one.seconds <= 1.005 * fastest]
    return min(close, key=lambda one: (_kinds(one.layout), AGAIN[one.layout.recompute], one.seconds))


def _kinds(layout: Layout) -> int:
    degrees = (layout.data, layout.shard, layout.tensor, layout.context, layout.pipeline, layout.expert)
    return sum(one > 1 for one in degrees)


def _here(job: Job, machine: Machine) -> Estimate:
    """One device, as `trivium run` uses it: 2,048 tokens a pass on a processor, all that fit on a GPU."""
    longest = float(max(job.context, 1))
    tokens = max(longest, min(job.batch or longest, CPU_TOKENS if "float32" in machine.peak else job.batch))
    while True:
        layout = Layout(
            micro_batch=tokens, micro_batches=max(1.0, job.batch / tokens), recompute=job.recompute
        )
        found = estimate(job, machine, layout)
        if found.fits or tokens <= longest:
            return found
        tokens = max(longest, tokens / 2)


def total(estimates: Iterable[Estimate]) -> dict[str, Any]:
    """The sum of all stages, and the most memory any of them needs."""
    every = list(estimates)
    disk = [disk_of(one.job) for one in every]
    return {
        "tokens": round(sum(one.job.tokens for one in every if one.job.trained_parameters)),
        "flops": sum(one.flops.total for one in every),
        "memory_bytes": round(max((one.memory.total for one in every), default=0)),
        "seconds": sum(one.seconds for one in every),
        "cost": sum(one.dollars for one in every),
        "disk_bytes": round(
            sum(one["model"] + one["optimiser_state"] for one in disk)
            + max((one["checkpoints"] for one in disk), default=0)
        ),
    }
