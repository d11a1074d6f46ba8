"""Pipeline parallelism: each process of a group holds some of the layers, one after the other.

The passes of a step go through as micro-batches, forward and backward in turns (1F1B: Narayanan et al.,
2104.04473, 2.2), by torch.distributed.pipelining. The first process also holds the embedding, the last one
the final norm and the head, and computes the loss; a table that is both lies on both, and its gradients are
added up. What a pass asks of the model (its tokens, and which of them see each other) each process learns
from the objective itself, which is stopped where it calls the model. With `shard` weights, gradients and
moments of a stage are divided among those of different pipelines that hold it (FSDP2).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

from trivium.data.rows import PackedSequence
from trivium.kit.errors import TriviumError
from trivium.kit.processes import all_reduce_sum, largest_of_all, world
from trivium.learn.parallel import sum_gradients
from trivium.learn.sharding import Divided, LossOf, refuse_short, shard_layers
from trivium.model.transformer import Transformer

IN_FLIGHT = 2
"""A step is cut into at least so many times as many passes as there are stages, if it has the rows."""


class Asked(NamedTuple):
    """What an objective asked of the model in one pass."""

    tokens: Tensor
    context: Any
    options: dict[str, Any]
    rounds: torch.dtype | None
    """The type in which matrices are multiplied, where it is not that of the weights."""


class _Stop(Exception):
    """Ends an objective where it calls the model."""


class _Stage:
    """What an objective is given in the model's place; what else it asks for, the stage here answers."""

    def __init__(self, model: Transformer) -> None:
        self.model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)


class _Recorder(_Stage):
    """Notes what it is asked, and computes nothing."""

    asked: Asked | None = None

    def __call__(self, tokens: Tensor, context: Any, **options: Any) -> Tensor:
        kind = tokens.device.type
        rounds = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        self.asked = Asked(tokens, context, options, rounds)
        raise _Stop


class _Answer(_Stage):
    """Has the hidden states that came through the pipeline."""

    hidden: Tensor
    called = False

    def __call__(self, tokens: Tensor, context: Any, **options: Any) -> Tensor:
        if self.called:
            raise TriviumError(
                "`parallel.pipeline` cannot train what asks the model twice in a pass; leave "
                "`parallel.pipeline` out, or say 1."
            )
        self.called = True
        return self.hidden if torch.is_grad_enabled() else self.hidden.detach()


class Own(nn.ModuleList):
    """The layers that this process holds, under their numbers among all of them."""

    def __init__(self, layers: nn.ModuleList, held: Sequence[int]) -> None:
        super().__init__()
        self.total = len(layers)
        for number in held:
            self.add_module(str(number), layers[number])

    def __len__(self) -> int:
        return self.total


class Nothing(nn.Module):
    """In place of a table that another process holds; it learns where anything before this stage does."""

    def __init__(self, table: Tensor, learns: bool) -> None:
        super().__init__()
        # A slice of the table would keep all of it in memory.
        self.weight = table.new_empty(0, table.shape[1]).requires_grad_(learns)


class Pipelines(Divided):
    """A copy of a model whose layers lie on the processes of a group, one after the other."""

    def __init__(self, model: Transformer, pipeline: int, shard: int, *, watched: bool = True) -> None:
        import torch.distributed as distributed

        refuse_short(model.config, pipeline)
        replicas = world().size // (pipeline * shard)
        # Between stages little is sent, so that the fastest links are left to those that share a stage.
        names = ("pipeline", "replicate", "shard")
        mesh = init_device_mesh(model.device.type, (pipeline, replicas, shard), mesh_dim_names=names)
        self.stage, self.stages = mesh.get_local_rank("pipeline"), pipeline
        self.group = pipeline
        self.line = mesh["pipeline"].get_group()
        # Parameters of their own on the same numbers, which the stage's own model may let go of.
        own = {id(one): nn.Parameter(one.detach(), one.requires_grad) for one in model.parameters()}
        super().__init__(model, copy.deepcopy(model, own), watched)
        self.is_first, self.is_last = self.stage == 0, self.stage == pipeline - 1
        _keep_stage(self.model, self.stage, pipeline)
        holders = mesh["replicate", "shard"]
        self.holders = holders._flatten("holders").get_group() if replicas > 1 else mesh["shard"].get_group()
        if shard > 1:
            self.root = shard_layers(self.model, holders if replicas > 1 else mesh["shard"], stays=True)
        self.peers = {name: self.holders for name, _ in self.model.named_parameters()}
        self.table_ends: Any = None
        """The two processes of this one's pipeline that hold a table which is embedding and head."""
        if model.config.tied:
            grid = mesh.mesh.flatten(1)
            ends = [[int(grid[0, at]), int(grid[-1, at])] for at in range(grid.shape[1])]
            self.table_ends, _ = distributed.new_subgroups_by_enumeration(ends)
        self.passing: list[Asked] = []
        self.shape: tuple[int, int] = (0, 0)
        self.schedule: Any = None
        self.loss_of: LossOf | None = None
        self.model.register_forward_pre_hook(self._enter, with_kwargs=True)
        self.model.register_forward_hook(self._leave, always_call=True)
        self.cast: Any = None
        self.release()

    @property
    def place(self) -> tuple[int, int]:
        """All stages of a pipeline read the same rows."""
        readers = world().size // self.stages
        return world().rank % readers, readers

    @property
    def speaks(self) -> bool:
        """The last stage knows the loss."""
        return self.is_last

    def passes(self, own: int) -> int:
        """A pipeline does its own passes, all of them the same number where they also divide weights."""
        return own if self.root is None else int(largest_of_all(own))

    def budget(self, rows: Sequence[PackedSequence], budget: int) -> int:
        """Tokens of a pass: as many passes as keep all stages at work."""
        tokens, longest = sum(len(row) for row in rows), max((len(row) for row in rows), default=1)
        return min(budget, max(longest, tokens // (IN_FLIGHT * self.stages)))

    def operations(self, passes: float, beside: float) -> float:
        """What all processes computed: each its own layers."""
        return all_reduce_sum(passes + beside)

    def accumulate(self, forward: Any, passes: int, loss_of: LossOf) -> None:
        """All passes of a step, through all stages and back."""
        self.passing = [self._asked(loss_of, number) for number in range(passes)]
        if not passes:
            return
        longest = max(len(one.tokens) for one in self.passing)
        if self.shape != (passes, longest):
            self.shape, self.schedule = (passes, longest), self._scheduled(passes, longest)
        self.loss_of = loss_of
        numbers = torch.arange(passes)
        try:
            self.schedule.step(
                *([numbers] if self.is_first else []), number=numbers, return_outputs=False,
                **({"target": numbers} if self.is_last else {}),
            )  # fmt: skip
        except RuntimeError as error:
            # The trainer goes by what went wrong, torch's error says only in which stage.
            if error.__cause__ is None:
                raise
            raise error.__cause__ from None
        self.passing = []

    def _asked(self, loss_of: LossOf, number: int) -> Asked:
        """What the objective asks of the model in a pass."""
        recorder = _Recorder(self.model)
        try:
            loss_of(recorder, number)
        except _Stop:
            assert recorder.asked is not None
            return recorder.asked
        raise AssertionError("an objective did not ask the model")

    def _scheduled(self, passes: int, longest: int) -> Any:
        """The order of so many passes, which send and take this many rows of numbers."""
        config, device = self.model.config, self.device
        kind = self.passing[0].rounds or self.whole.dtype
        stream = torch.empty(longest, config.width, dtype=kind, device=device, requires_grad=True)
        stage = PipelineStage(
            self.model, self.stage, self.stages, device, group=self.line, output_args=stream,
            input_args=torch.zeros(1, dtype=torch.int64) if self.is_first else stream,
        )  # fmt: skip
        schedule = Schedule1F1B if passes >= self.stages else ScheduleGPipe
        return schedule(stage, passes, loss_fn=self._loss, scale_grads=False)

    def _loss(self, hidden: Tensor, number: Tensor) -> Tensor:
        """The loss of a pass, of which this process has the final hidden states."""
        assert self.loss_of is not None
        answer = _Answer(self.model)
        answer.hidden = hidden
        return self.loss_of(answer, int(number))

    def _enter(self, module: Any, inputs: tuple[Tensor], options: dict[str, Tensor]) -> Any:
        """A pass by its number, and what came from the stage before, as the model takes them."""
        asked = self.passing[int(options["number"])]
        wishes = dict(asked.options)
        if not self.is_last:
            wishes.pop("wanted", None)
        if not self.is_first:
            wishes.pop("noise", None)
            wishes["embeddings"] = inputs[0][: len(asked.tokens)]
        rounds = asked.rounds is not None
        self.cast = torch.autocast(self.device.type, asked.rounds, enabled=rounds, cache_enabled=False)
        self.cast.__enter__()
        return (asked.tokens, asked.context), wishes

    def _leave(self, module: Any, inputs: Any, stream: Tensor | None) -> Tensor | None:
        """The stream for the next stage, as long as that of the step's longest pass."""
        self.cast.__exit__(None, None, None)
        if self.is_last or stream is None:
            return stream
        return nn.functional.pad(stream, (0, 0, 0, self.shape[1] - len(stream)))

    @torch.no_grad()
    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Sum over the holders of each stage, of a table at both ends over these; heads over all."""
        parameters = list(parameters)
        held = {id(one) for one in self.model.parameters()}
        # A head of a stage's own is computed at the end of each pipeline, and by no other process.
        sum_gradients([one for one in parameters if id(one) not in held])
        mine = [one for one in parameters if id(one) in held]
        if self.root is None:
            sum_gradients(mine, self.holders)
        if self.table_ends is not None and (self.is_first or self.is_last):
            table = self.model.embedding.weight
            sum_gradients([one for one in mine if one is table], self.table_ends)


def _keep_stage(model: Transformer, stage: int, stages: int) -> None:
    """Leave of a model, in place, what one stage computes."""
    held = torch.arange(len(model.layers)).tensor_split(stages)[stage].tolist()
    before = [model.embedding, *model.layers[: held[0]]]
    learns = any(one.requires_grad for part in before for one in part.parameters())
    model.layers = Own(model.layers, held)
    is_first, is_last = stage == 0, stage == stages - 1
    config = model.config.of_layers(held)
    if not is_last:
        config = config.changed(logit_divisor=1.0)
        model.norm, model.head = nn.Identity(), None
    if not is_first:
        model.position_embedding = None
        if not (is_last and model.config.tied):
            model.embedding = Nothing(model.embedding.weight, learns)  # type: ignore[assignment]
    model.config = config
