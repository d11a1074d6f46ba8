"""Expert parallelism: of a mixture of experts each process of a group holds some of the experts, whole.

The processes train on rows of their own. In each mixture a token is sent to those that hold the experts its
router picked, and what these make of it is sent back: two all-to-alls, and two more in the backward pass
(Lepikhin et al., 2006.16668). So an expert's gradient is that of the rows of its whole group, while all other
weights are held, and their gradients summed, by all processes. With `shard` weights, gradients and moments
are divided as well (FSDP2): those of an expert among the processes of different groups that hold it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_to_all_single_autograd
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

from trivium.kit.processes import world
from trivium.learn.holders import is_divided
from trivium.learn.parallel import sum_gradients
from trivium.learn.sharding import Divided, shard_layers
from trivium.model.experts import Experts, Mixture
from trivium.model.operations import in_product_type
from trivium.model.transformer import Transformer


class HeldExperts(Experts):
    """Those of a mixture's experts that this process holds, under their names among all of them.

    The processes of a group hold as many each, in the order of their ranks, and call it together.
    """

    def __init__(self, experts: Experts, mesh: DeviceMesh) -> None:
        super().__init__()
        self.group, self.size = mesh.get_group(), mesh.size()
        each = len(experts) // self.size
        first = mesh.get_local_rank() * each
        for number in range(first, first + each):
            self.add_module(str(number), experts[number])
        self.trains = any(one.requires_grad for one in experts.parameters())
        """Whether an expert learns, held by whichever process."""

    def forward(self, rows: Tensor, counts: Tensor) -> Tensor:
        """Rows [N, width] in the order of all experts, of which each takes its count -> [N, width]."""
        if self.trains and torch.is_grad_enabled() and not rows.requires_grad:
            # All processes send gradients back, or none: also those of which no expert learns.
            rows = rows.detach().requires_grad_()
        (rows,) = in_product_type(rows)
        asked = counts.view(self.size, -1)
        # From each process, the rows for each expert that is held here: [size, held].
        taken = all_to_all_single_autograd(asked, None, None, self.group)
        sends, receives = asked.sum(1).tolist(), taken.sum(1).tolist()
        arrived = all_to_all_single_autograd(rows, receives, sends, self.group)
        expert = torch.arange(taken.shape[1], device=rows.device).repeat(self.size)
        order = expert.repeat_interleave(taken.flatten()).argsort(stable=True)
        sorted_rows = arrived.index_select(0, order).split(taken.sum(0).tolist())
        made = torch.cat([one(mine) for one, mine in zip(self, sorted_rows, strict=True)])
        back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        return all_to_all_single_autograd(made.index_select(0, back), sends, receives, self.group)


class ExpertGroups(Divided):
    """A copy of a model of which each process of a group of `expert` holds its share of the experts.

    With `shard`, a multiple of `expert`, all else is divided among so many processes, and an expert among
    those of them that hold it.
    """

    def __init__(self, model: Transformer, expert: int, shard: int, *, watched: bool = True) -> None:
        size, parts = world().size, max(shard // expert, 1)
        shape = (size // (parts * expert), parts, expert)
        # The ranks of a group are neighbours, as what they send in every layer needs the fastest links.
        mesh = init_device_mesh(model.device.type, shape, mesh_dim_names=("replicate", "shard", "expert"))
        # Parameters of their own on the same numbers, which the stage's own model may let go of.
        own = {id(one): nn.Parameter(one.detach(), one.requires_grad) for one in model.parameters()}
        super().__init__(model, copy.deepcopy(model, own), watched)
        mixtures = [layer.mlp for layer in self.model.layers if isinstance(layer.mlp, Mixture)]
        for one in mixtures:
            one.experts = HeldExperts(one.experts, mesh["expert"])
        if parts > 1:
            over = mesh["replicate", "shard"] if shape[0] > 1 else mesh["shard"]
            self.holders = over._flatten("holders").get_group() if shape[0] > 1 else over.get_group()
            for one in mixtures:
                fully_shard(one.experts, mesh=over, reshard_after_forward=True)
        else:
            self.holders = mesh["replicate"].get_group()
        if shard > 1:
            places = (size // shard, shard) if size > shard else (shard,)
            names = ("replicate", "shard")[-len(places) :]
            every = init_device_mesh(model.device.type, places, mesh_dim_names=names)
            apart = [weight for one in mixtures for weight in one.experts.parameters() if parts == 1]
            self.root = shard_layers(self.model, every, apart)
        held = {id(weight) for one in mixtures for weight in one.experts.parameters()}
        self.peers = {name: self.holders for name, one in self.model.named_parameters() if id(one) in held}
        self.release()

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Sum those of experts over their holders, others over all; FSDP2 has summed what it divides."""
        whole = [one for one in parameters if not is_divided(one)]
        held = {id(self.model.get_parameter(name)) for name in self.peers}
        sum_gradients([one for one in whole if id(one) not in held])
        sum_gradients([one for one in whole if id(one) in held], self.holders)
