"""A mixture of experts: each token passes through the few inner networks its router picks."""

import torch
from torch import Tensor, nn

from trivium.model.config import ExpertsConfig, ModelConfig
from trivium.model.layers import Inner


class Routing:
    """What the routers did in one pass, for the loss that keeps experts equally busy."""

    def __init__(self) -> None:
        self.probabilities: list[Tensor] = []
        self.counts: list[Tensor] = []
        self.tokens = 0

    def note(self, probabilities: Tensor, counts: Tensor) -> None:
        """Remember one layer: probabilities [N, experts], how many tokens each expert took [experts]."""
        self.probabilities.append(probabilities.sum(0))
        self.counts.append(counts)
        self.tokens += len(probabilities)

    def balance_loss(self) -> Tensor:
        """Experts times sum(share taken x probability given): Switch Transformer, eq. 4."""
        share = torch.stack(self.counts).sum(0) / self.tokens
        given = torch.stack(self.probabilities).sum(0) / self.tokens
        return len(share) * (share * given).sum()

    def shares(self) -> Tensor:
        """Each expert's share of all picks."""
        counts = torch.stack(self.counts).sum(0).float()
        return counts / counts.sum()


class Experts(nn.ModuleList):
    """Inner networks, computed one after the other, each on all of its tokens."""

    def forward(self, rows: Tensor, counts: Tensor) -> Tensor:
        """What experts make of rows [N, width] in their order, of which each takes its count: [N, width]."""
        inputs = rows.split(counts.tolist())
        # Where weights learn, an expert without tokens has a gradient, too, which is zero: processes that
        # divide the weights have to send the same.
        outputs = [
            expert(mine)
            for expert, mine in zip(self, inputs, strict=True)
            if len(mine) or torch.is_grad_enabled()
        ]
        return torch.cat(outputs)


class Mixture(nn.Module):
    """Experts behind a router."""

    def __init__(self, config: ModelConfig, experts: ExpertsConfig) -> None:
        super().__init__()
        self.per_token = experts.per_token
        self.normalise = experts.normalise
        self.router = nn.Linear(config.width, experts.count, bias=False)
        self.experts = Experts(Inner(config, experts.inner_width) for _ in range(experts.count))

    def forward(self, rows: Tensor, routing: Routing | None = None) -> Tensor:
        probabilities = self.router(rows).float().softmax(-1)
        weights, chosen = probabilities.topk(self.per_token, dim=-1)
        if self.normalise:
            weights = weights / weights.sum(-1, keepdim=True)
        picks = chosen.flatten()
        order = picks.argsort(stable=True)
        counts = torch.bincount(picks, minlength=probabilities.shape[-1])
        if routing is not None:
            routing.note(probabilities, counts)
        outputs = self.experts(rows.index_select(0, order // self.per_token), counts)
        # A gather back and a weighted sum: a scattered sum would add in an order that may change.
        back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        joined = outputs.index_select(0, back).view(len(rows), self.per_token, rows.shape[-1])
        return torch.matmul(weights.to(rows.dtype)[:, None, :], joined)[:, 0]
