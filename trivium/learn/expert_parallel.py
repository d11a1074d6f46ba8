"""Expert parallelism: of a mixture of experts each process of a group holds some of the experts, whole.

The processes train on rows of their own. In each mixture a token is sent to those that hold the experts its
router picked, and what these make of it is sent back: two all-to-alls, and two more in the backward pass
(Lepikhin et al., 2006.16668). So an expert's gradient is that of the rows of its whole group, while all other
weights are held, and their gradients summed, by all processes. With `shard` weights, gradients and moments
are divided as well (FSDP2): those of an expert among the processes of different groups that hold it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed._functional_collectives import all_to_all_single_autograd
from torch.distributed.device_mesh import DeviceMesh

from trivium.model.experts import Experts
from trivium.model.operations import in_product_type


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
