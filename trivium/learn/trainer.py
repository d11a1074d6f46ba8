"""The one loop: rows from a batch source, a loss from an objective, a step of the optimiser, again."""

import copy
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trivium.data.rows import PackedSequence, collate
from trivium.kit.errors import TriviumError
from trivium.kit.machine import keep_freed_memory, product_seconds
from trivium.kit.metrics import MetricsLog, read_metrics
from trivium.kit.numbers import short
from trivium.kit.processes import all_reduce_sum, world
from trivium.kit.progress import Progress
from trivium.kit.stopping import StopRequested, leave_word, requested
from trivium.learn import pass_size, schedules
from trivium.learn.checkpoints import Checkpoints, State, kept_place
from trivium.learn.determinism import WITHIN_ROUNDING, deterministic_kernels, how_it_resumes, refused
from trivium.learn.objective import BatchSource, Maximum, Measure, Objective, accumulate
from trivium.learn.objectives.near_parent import NearPredictions, NearWeights
from trivium.learn.optimisers import Inherited, LearningRates, Optimiser
from trivium.learn.parallel import alike, clip, measures_of_all
from trivium.learn.pieces import Held, SavedTensors
from trivium.learn.precision import one_pass, product_dtype
from trivium.learn.rank_watch import RankWatch, watching
from trivium.learn.rows_ahead import RowsAhead
from trivium.learn.score_terms import compiled_terms
from trivium.learn.settings import Training
from trivium.learn.sharding import Fill, divided, gathered_by_first, layout_of, trained_parameters
from trivium.learn.utilisation import utilisation
from trivium.learn.validation import ValidationLoss, groups_of
from trivium.model.arithmetic import counted
from trivium.model.transformer import Transformer

COMPILE_SECONDS = 40.0
"""What compiling costs on two cores; only a longer run than ten times this repays it."""
TIMED_STEPS = 16
"""Every so many steps a GPU is waited for, so that its own work can be timed."""


SHOWN = {
    "loss": "loss", "bits_per_byte": "bits_per_byte", "validation_loss": "validation", "reward": "reward",
    "kl": "KL", "objective/kl": "KL", "entropy": "entropy", "policy/entropy_avg": "entropy",
    "completions/mean_length": "length", "frac_reward_zero_std": "taught nothing",
    "rewards/accuracies": "accuracy", "rewards/margins": "margin", "accuracy": "accuracy", "margin": "margin",
}  # fmt: skip
"""What of a step's row stands in the line of progress, and how it is called there."""


@dataclass
class Hooks:
    """What a stage wants done along the way; the loop itself measures, samples and keeps nothing."""

    validate: Callable[[], Mapping[str, ValidationLoss]] | None = None
    sample: Callable[[int], None] | None = None
    keep: Callable[[int, int], None] | None = None
    """Called after a step at which the model shall be kept: with the step and the tokens so far."""


@dataclass(frozen=True)
class Reshape:
    """A change of the model's shape in the middle of a training, such as growth."""

    step: int
    """After so many steps it is made."""
    apply: Callable[[Transformer], Callable[[Mapping[str, Tensor]], dict[str, Tensor]]]
    """Changes the model in place, alike whenever it is called; returns how the optimiser's state follows."""
    warmup: int = 0
    """Over so many steps after it the learning rate rises again from near zero."""
    freezes: bool = False
    """Whether it ends the training of weights that were trained before: these stay part of the state."""
    passing: bool = False
    """Whether another one follows at once, so that compiling the forward pass would not pay."""


@dataclass
class Trainer:
    """Trains a model with an objective on a batch source; stopped at any moment, it goes on bit for bit."""

    model: Transformer
    objective: Objective
    batches: BatchSource
    settings: Training
    rates: LearningRates
    folder: Path
    log: MetricsLog
    progress: Progress
    seed: int = 0
    hooks: Hooks = field(default_factory=Hooks)
    parent_moments: Mapping[str, Tensor] | None = None
    reshapes: Sequence[Reshape] = ()
    """In the order of their steps."""
    watched: bool = True
    """Whether something besides the hooks looks at the whole model, at any time or after the end."""
    fill: Fill | None = None
    """Has the numbers of a model that was made without."""

    def __post_init__(self) -> None:
        rate = schedules.in_steps(self.settings.learning_rate, self.settings.batch)
        self.settings = self.settings.model_copy(update={"learning_rate": rate})
        self.model.recompute = self.settings.recompute
        self.layout = layout_of(
            self.model, self.settings.parallel, has_extra=self.objective.extra is not None,
            reshapes=bool(self.reshapes), pulls=self._pulls_weights(), asks_twice=self._asks_twice(),
            watched=self.watched, fill=self.fill, say=self.progress.say,
        )  # fmt: skip
        self._take_parameters()
        self.inherited: Inherited | None = None
        if self.parent_moments is not None:
            self.inherited = self.optimiser.restore(self._divided(self.parent_moments))
        self.average = (
            {name: parameter.detach().clone() for name, parameter in self.named.items()}
            if self.settings.ema is not None
            else {}
        )
        self.checkpoints = Checkpoints(
            self.folder / "checkpoints", self.settings.checkpoint.keep, self.progress.say
        )
        self.reader, self.readers = self.layout.place
        self.step = self.tokens = self.bad_steps = self.skipped = 0
        self.budget = pass_size.first_budget(self.settings.micro_batch, self.model.device)
        self.reshaped = 0
        self.rows_ahead = RowsAhead(self.batches)
        self.kept_places = [kept_place(place) for place in self.settings.checkpoint.at]
        self.stop_signal: int | None = None
        self.watch = RankWatch(self.progress.say)
        self.seconds = 0.0
        self.flops = self.in_passes = 0.0

    def _pulls_weights(self) -> bool:
        """Whether the loss holds the weights of the stage's own model, not of a copy that is trained."""
        return any(isinstance(guard, NearWeights) for guard in getattr(self.objective, "guards", ()))

    def _asks_twice(self) -> bool:
        """Whether a pass also asks the model that is trained for what it says without its adapter."""
        guards = getattr(self.objective, "guards", ())
        beside = any(isinstance(one, NearPredictions) and one.reference is None for one in guards)
        return beside or getattr(self.objective, "beside", None) == "adapter off"

    def _take_parameters(self) -> None:
        """Whatever the model trains now, with an optimiser whose state is zero."""
        self.named: dict[str, nn.Parameter] = trained_parameters(self.layout.model)
        if self.objective.extra is not None:
            self.named |= {f"extra.{name}": p for name, p in self.objective.extra.named_parameters()}
        self.optimiser = Optimiser(
            self.named,
            self.rates,
            muon=self.settings.optimiser == "muon",
            products=product_dtype(self.settings.precision, self.model.device),
            peers=self.layout.peers,
        )
        self.forward: Any = self.layout.model
        self.compiles = False

    def _reshape_before(self, step: int) -> None:
        """Make the changes of shape that lie before this step, in the order they were made first."""
        for reshape in self.reshapes[self.reshaped :]:
            if reshape.step >= step:
                return
            average = None
            if self.average:
                # The running mean changes its shape as the weights do.
                average = copy.deepcopy(self.model)
                with torch.no_grad():
                    for name, mean in self.average.items():
                        average.get_parameter(name).copy_(mean)
                reshape.apply(average)
            moved = reshape.apply(self.model)
            state = moved(self.optimiser.state())
            self._take_parameters()
            self.optimiser.restore(state)
            if average is not None:
                self.average = {name: average.get_parameter(name).detach().clone() for name in self.named}
            self.reshaped += 1
            self.make_ready()

    # the loop

    def run(self) -> dict[str, Any]:
        """Train to the end of the batches and return what a summary needs."""
        self._resume()
        self.make_ready()
        saved = time.monotonic()
        last: dict[str, Any] = {}
        with self._signals(), watching(self.watch), deterministic_kernels(self.settings.deterministic):
            resumes = how_it_resumes(self.model.device)
            while self.step < self.batches.steps:
                self._reshape_before(self.step + 1)
                before = self.tokens
                with counted() as tally:
                    last = self._one_step()
                beside = tally.operations - self.in_passes
                self.flops += self.layout.operations(self.in_passes, beside)
                last["flops"] = self.flops
                if self.layout.divided and self.step % TIMED_STEPS == 0:
                    # Processes that share weights wait for each other in every layer: passes take as long.
                    self.watch.took(product_seconds())
                self.watch.at(self.step, "measuring")
                self._after_step(last, before)
                due = time.monotonic() - saved >= self.settings.checkpoint.every_seconds
                every = self.settings.checkpoint.every_steps
                if every is not None:
                    due = self.step % every == 0
                self.watch.at(self.step, "agreeing on what follows")
                self.checkpoints.settle()
                if self._agreed(due) and self.step < self.batches.steps:
                    self.watch.at(self.step, "saving")
                    self._save(wait=False)
                    saved = time.monotonic()
                stops = self._agreed(self.stop_signal is not None or requested())
                if stops and self.step < self.batches.steps:
                    self._save(wait=True)
                    self.progress.say(f"Stopped after step {self.step}; the same command goes on from there.")
                    # A signal counts for more: who sent it decides what happens next.
                    if not self._agreed(self.stop_signal is not None):
                        raise StopRequested
                    if self.stop_signal == signal.SIGTERM:
                        leave_word()
                    raise KeyboardInterrupt
        self.checkpoints.finish()
        self._take_average()
        self.layout.show(to_all=self.watched)
        return {
            "steps": self.step,
            "tokens": self.tokens,
            "loss": last.get("loss", self._last_loss()),
            "skipped_steps": self.skipped,
            "train_seconds": round(self.seconds, 2),
            "resumes": resumes,
            **{key: value for key, value in last.items() if key.startswith(("bits_per_byte", "validation"))},
        }

    def _one_step(self) -> dict[str, Any]:
        """One optimiser step: all rows of the step forward and backward, then one move of the weights."""
        start = time.perf_counter()
        self.watch.at(self.step + 1, "reading rows")
        # Whatever draws random numbers in a step draws the same after a resume.
        seed = (self.seed * 1_000_003 + self.step) % 2**63
        if self.model.device.type == "cpu":
            # For each kind of device that is absent, `torch.manual_seed` formats the stack: 2 ms a step.
            torch.default_generator.manual_seed(seed)
        else:
            torch.manual_seed(seed)
        rows = self.rows_ahead.rows(self.step)
        with counted() as tally:
            measures, norm = self._gradient(rows)
        self.in_passes = tally.operations
        own_flops = self.layout.operations(tally.operations, 0.0) / world().size
        factor = schedules.factor(self.settings.learning_rate, self.step, self.batches.steps)
        factor *= self._warmed()
        loss = measures["objective"][0]
        finite = math.isfinite(norm) and math.isfinite(loss)
        if finite:
            self.bad_steps = 0
            clip(self.named.values(), torch.tensor(norm, device=self.model.device), self.settings.clip)
            self.optimiser.step(factor)
            self._update_average()
            self.layout.follow()
        for parameter in self.named.values():
            parameter.grad = None
        if not finite:
            self._skip(rows, loss, norm)
        self.step += 1
        self.tokens += sum(len(row) for row in rows)
        seconds = time.perf_counter() - start
        self.seconds += seconds
        from_source = self.batches.metrics(self.step - 1)
        products = None if self.settings.precision == "float8" else self.optimiser.products
        averages = {
            name: total / weight
            for name, (total, weight) in measures.items()
            if weight and name != "objective"
        }
        return {
            "step": self.step,
            "tokens": self.tokens,
            "loss": averages.pop("loss", loss),
            "grad_norm": norm,
            "learning_rate": self.rates.matrices * factor,
            "tokens_per_second": round(sum(len(row) for row in rows) / seconds, 1),
            "data_wait": round(self.rows_ahead.waited / seconds, 4),
            **utilisation(self.model.device, products, own_flops, seconds),
            **averages,
            **from_source,
        }

    def _gradient(self, rows: Sequence[PackedSequence]) -> tuple[dict[str, tuple[float, float]], float]:
        """Leave the gradient of the whole step in the parameters; returns the measures and its length."""
        mine, spare = rows[self.reader :: self.readers], rows[:1]
        # Of processes that compute the same passes together one speaks for all.
        speaks = self.layout.speaks
        self.watch.at(self.step + 1, "adding up weights")
        weight = all_reduce_sum(self.objective.weight(mine) if speaks else 0.0)
        self.watch.at(self.step + 1, "passes")
        if self.budget == pass_size.UNSIZED:
            self._size_passes(mine, spare)
        while (measures := self._accumulate_if_it_fits(mine, spare, weight)) is None:
            # Only here, outside the handler, is what the failed pass held in memory free again.
            self._halve(mine)
        self._time_own_work()
        self.watch.at(self.step + 1, "summing gradients")
        self.layout.sum_gradients(self.named.values())
        own = measures if speaks else {"objective": (0.0, 0.0)}
        # The norm is everywhere the same. Read with the measures, it costs no wait of its own for a GPU.
        totals = measures_of_all({**own, "norm": Maximum(self.layout.norm(self.named))})
        return totals, totals.pop("norm")[0]

    def _size_passes(self, mine: Sequence[PackedSequence], spare: Sequence[PackedSequence]) -> None:
        """Try passes of growing size, so that none has to run out of memory."""
        meter = pass_size.meter_of(self.model.device)
        # The stages of a pipeline are made for the passes of one size.
        if meter is None or self.settings.parallel.pipeline > 1:
            return
        self.budget -= 1
        with pass_size.trial(self.model.device):
            self.budget = pass_size.tokens_that_fit(
                mine, lambda rows: self._accumulate_if_it_fits(rows, spare, 1.0) is not None, meter
            )
        self.progress.say(f"Passes of {self.budget} tokens at the most, as tried before the first step.")

    def _time_own_work(self) -> None:
        """Tell the watch how long this process worked on its own rows, without waiting for the others."""
        is_processor = self.model.device.type == "cpu"
        if world().size > 1 and not self.layout.divided and (is_processor or self.step % TIMED_STEPS == 0):
            if not is_processor:
                torch.cuda.synchronize()
            self.watch.worked()

    def _accumulate_if_it_fits(
        self, mine: Sequence[PackedSequence], spare: Sequence[PackedSequence], weight: float
    ) -> dict[str, Measure] | None:
        try:
            return self._accumulate(mine, spare, weight)
        except (RuntimeError, MemoryError) as error:
            if self.settings.deterministic and refused(error):
                raise TriviumError(
                    f"`deterministic` cannot be had here: {str(error).splitlines()[0]} Leave it out; "
                    "a resumed run then ends within rounding of one that was never stopped."
                ) from error
            if not pass_size.is_out_of_memory(error):
                raise
            if self.layout.divided:
                raise TriviumError("a pass does not fit into memory; lower `micro_batch`.") from error
            return None

    def _accumulate(
        self, mine: Sequence[PackedSequence], spare: Sequence[PackedSequence], weight: float
    ) -> dict[str, Measure]:
        measures: dict[str, Measure] = {"objective": (0.0, 0.0)}
        for parameter in self.named.values():
            parameter.grad = None
        groups = groups_of(mine, self.layout.budget(mine, self.budget))

        def loss_of(forward: Any, number: int) -> Tensor:
            # A process with fewer rows than others repeats one of the step's, which weighs nothing.
            counts = number < len(groups)
            group = groups[number] if counts else spare
            with one_pass(self.settings.precision, self.model.device), compiled_terms(self.compiles):
                result = self.objective.loss(forward, collate(group, self.model.device))
                # Divided by the weight of the whole step, the gradient is the same however rows are grouped.
                loss = result.sum / max(weight, 1e-12) if counts else result.sum * 0
            if counts:
                accumulate(measures, {"objective": (loss.detach(), 1.0), **result.metrics})
            return loss

        self.layout.accumulate(self.forward, self.layout.passes(len(groups)), loss_of)
        return measures

    def _halve(self, mine: Sequence[PackedSequence]) -> None:
        """Too much for the memory: go on with passes of half the size."""
        longest = max(len(row) for row in mine)
        largest = min(self.budget, sum(len(row) for row in mine))
        if largest <= longest:
            raise TriviumError(f"A single row of {longest} tokens does not fit into memory; lower `context`.")
        self.budget = max(longest, largest // 2)
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()
        self.progress.say(f"Out of memory: going on with {self.budget} tokens per pass.")

    def _skip(self, rows: Sequence[PackedSequence], loss: float, norm: float) -> None:
        """A loss or gradient that is not finite never reaches the weights."""
        self.bad_steps += 1
        self.skipped += 1
        ids = sorted({identity for row in rows for identity in row.ids})
        self.progress.say(
            f"Step {self.step + 1} skipped: loss {loss}, gradient norm {norm} ({self.bad_steps} in a row)."
        )
        if self.bad_steps >= self.settings.max_bad_steps:
            shown = ", ".join(ids[:20]) + (f" and {len(ids) - 20} more" if len(ids) > 20 else "")
            raise TriviumError(
                f"{self.bad_steps} steps in a row gave a loss or gradient that is not finite; lower "
                f"`learning_rate`, or look at the documents of the last batch: {shown}"
            )

    # along the way

    def _after_step(self, row: dict[str, Any], before: int) -> None:
        """Measure, sample and keep where it is due, and log the step."""
        hooks = self.hooks
        validate = hooks.validate if self._due(self.settings.validation.times) else None
        sample = hooks.sample if self._due(self.settings.samples.times) else None
        keep = hooks.keep if self._is_kept(before) else None
        if keep is not None:
            self.rows_ahead.settle()
        with self._shown() if validate or sample or keep else nullcontext():
            for name, measured in (validate() if validate is not None else {}).items():
                suffix = f"/{name}" if name else ""
                row[f"validation_loss{suffix}"] = measured.loss
                row[f"bits_per_byte{suffix}"] = measured.bits_per_byte
            if world().leads:
                self.log.write(row)
            if sample is not None:
                sample(self.step)
            if keep is not None:
                keep(self.step, self.tokens)
        shown = {SHOWN[key]: row[key] for key in SHOWN if row.get(key) is not None}
        speed = f"{short(row['tokens_per_second'])} tokens/s" if row.get("tokens_per_second") else ""
        self.progress.update(self.step, self.batches.steps, unit="steps", speed=speed, **shown)

    def _due(self, times: int) -> bool:
        """Whether one of `times` evenly spread moments, the last of them the end, falls on this step."""
        if times == 0:
            return False
        return (self.step * times) // self.batches.steps > ((self.step - 1) * times) // self.batches.steps

    def _is_kept(self, before: int) -> bool:
        """Whether this step reached one of the places whose model is to be kept."""
        for unit, goal in self.kept_places:
            if (unit == "step" and self.step == goal) or (unit == "tokens" and before < goal <= self.tokens):
                return True
        return False

    def _warmed(self) -> float:
        """The share of the learning rate that a recent change of shape leaves."""
        since = [(self.step - one.step, one.warmup) for one in self.reshapes[: self.reshaped]]
        return min((min(1.0, (steps + 1) / (warmup + 1)) for steps, warmup in since), default=1.0)

    def _update_average(self) -> None:
        if self.settings.ema is not None:
            current = alike(self.named[name].detach() for name in self.average)
            for means, weights in zip(alike(self.average.values()), current, strict=True):
                torch._foreach_lerp_(means, weights, 1 - self.settings.ema)

    @torch.no_grad()
    def _take_average(self) -> None:
        for name, average in self.average.items():
            self.named[name].copy_(average)
        if self.settings.ema is not None:
            self.layout.follow()

    @contextmanager
    def _shown(self) -> Iterator[None]:
        """Inside the block the model is whole, and what would be saved: that is measured and kept."""
        now = {name: self.named[name].detach().clone() for name in self.average}
        self._take_average()
        self.layout.show()
        yield
        self.layout.release()
        with torch.no_grad():
            for name, weight in now.items():
                self.named[name].copy_(weight)
        if self.settings.ema is not None:
            self.layout.follow()

    # stopping and going on

    def _facts(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Everything needed to go on from here; of what is divided, this process's parts."""
        source_facts, source_tensors = self.batches.state()
        facts: dict[str, Any] = {
            "step": self.step,
            "tokens": self.tokens,
            "bad_steps": self.bad_steps,
            "skipped": self.skipped,
            "budget": self.budget,
            "seconds": self.seconds,
            "flops": self.flops,
            "feed": source_facts,
            "feed_fingerprint": self.batches.fingerprint,
        }
        tensors: dict[str, Tensor] = {f"weights.{name}": one for name, one in self._held().items()}
        tensors |= {f"optimiser.{name}": tensor for name, tensor in self.optimiser.state().items()}
        tensors |= {f"average.{name}": tensor for name, tensor in self.average.items()}
        tensors |= {f"feed.{name}": tensor for name, tensor in source_tensors.items()}
        return facts, tensors

    def _held(self) -> dict[str, Tensor]:
        """The weights of a state: what is trained, and what was until a change of shape froze it."""
        frozen = any(one.freezes for one in self.reshapes[: self.reshaped])
        return {**(dict(self.model.named_parameters()) if frozen else {}), **self.named}

    def moments(self) -> dict[str, Tensor]:
        """The optimiser's whole state; of a divided model the first process alone has it."""
        return gathered_by_first(self.optimiser.state())

    def _divided(self, moments: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """An optimiser's state as this process holds it."""
        own = self.optimiser.state()
        return Held(moments, "", own) if isinstance(moments, SavedTensors) else divided(moments, own)

    def _save(self, wait: bool) -> None:
        if world().leads:
            # A state must not outlive a power cut that the rows before it do not.
            self.log.sync()
        self.checkpoints.save(self.step, *self._facts(), wait=wait)

    def _resume(self) -> None:
        """Go on from the newest whole state, if there is one; the log is cut back to it."""
        state = self.checkpoints.latest()
        if state is None:
            if world().leads:
                self.log.rewind(0)
            return
        self._restore(state)
        if world().leads:
            self.log.rewind(self.step)
        exact = self.settings.deterministic or how_it_resumes(self.model.device) != WITHIN_ROUNDING
        near = "" if exact else ", within rounding: this GPU's kernels add in any order"
        self.progress.say(f"Going on after step {self.step} of {self.batches.steps}{near}.")

    @torch.no_grad()
    def _restore(self, state: State) -> None:
        facts, tensors = state.facts, state.tensors
        if facts["feed_fingerprint"] != self.batches.fingerprint:
            raise TriviumError(
                f"{self.checkpoints.folder} was written by a run on other data or another order; undo that, "
                "or remove the folder to start the stage again"
            )
        self._reshape_before(facts["step"])
        held = self._held()
        weights = Held(tensors, "weights.", held)
        for name, parameter in held.items():
            parameter.copy_(weights[name])
        missing = self.optimiser.restore(Held(tensors, "optimiser.", self.optimiser.state())).fresh
        assert not missing, f"the state has no moments of {missing}"
        means = Held(tensors, "average.", self.average)
        for name, average in self.average.items():
            average.copy_(means[name])
        self.layout.follow()
        self.batches.restore(facts["feed"], dict(Held(tensors, "feed.", {})))
        self.step, self.tokens = facts["step"], facts["tokens"]
        self.bad_steps, self.skipped = facts["bad_steps"], facts["skipped"]
        self.budget, self.seconds = facts["budget"], facts["seconds"]
        self.flops = facts.get("flops", 0.0)

    def _agreed(self, wish: bool) -> bool:
        """Whether any process wishes it: all have to save, or to stop, after the same step."""
        return all_reduce_sum(float(wish)) > 0

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """A polite stop is noted, and obeyed after the step under way."""

        def note(number: int, frame: object) -> None:
            self.stop_signal = number

        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def make_ready(self) -> None:
        """Keep memory between steps, and compile the forward pass where the run is long enough."""
        if self.model.device.type == "cpu":
            keep_freed_memory()
        self.compiles = self.settings.compile == "on"
        if self.settings.compile == "auto":
            # Decided by the whole run, not by what is left: a resumed run must round as the first part did.
            self.compiles = self._seconds_expected() > 10 * COMPILE_SECONDS
        passing = self.reshaped and self.reshapes[self.reshaped - 1].passing
        if self.compiles and not passing:
            self.forward = self.layout.compiled()

    def _seconds_expected(self) -> float:
        """What the run would take uncompiled, from the model's size and the kind of machine."""
        parameters = sum(parameter.numel() for parameter in self.named.values())
        speed = 1e11 if self.model.device.type == "cpu" else 1e14
        per_step = 6 * parameters * (self.settings.batch or pass_size.CPU_TOKENS) / speed
        return per_step * self.batches.steps

    def _last_loss(self) -> float | None:
        rows = [row for row in read_metrics(self.log.path) if "loss" in row]
        return rows[-1]["loss"] if rows else None
