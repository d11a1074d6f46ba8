"""Heads with which a model drafts for itself: guesses at the tokens after the next one, from one state.

Medusa's heads (Cai et al. 2024, 2401.10774) with the model's own output matrix in place of one for each. From
the hidden state h after the last norm the model predicts the next token as softmax(E h); head k = 1..K
guesses the token k places further on as

    softmax(E h_k),    h_k = h + silu(W_k h + b_k).

W_k and b_k are zero at first, so a head begins as a copy of the model's own.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trivium.kit.errors import TriviumError
from trivium.kit.files import load_tensors, save_tensors

FILE = "draft_heads.safetensors"
"""Beside the weights of the model that the heads belong to."""


class DraftHeads(nn.Module):
    """A residual block for each of the next few tokens."""

    def __init__(self, width: int, count: int) -> None:
        super().__init__()
        self.width = width
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(count))
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.zero_()

    def __len__(self) -> int:
        return len(self.blocks)

    def forward(self, hidden: Tensor, head: int) -> Tensor:
        """The state from which head number `head`, counted from 0, guesses: [N, width] -> [N, width]."""
        return hidden + F.silu(self.blocks[head](hidden))


def save_draft_heads(heads: DraftHeads, folder: Path) -> None:
    """Write the heads into the folder of their model."""
    save_tensors(folder / FILE, dict(heads.state_dict()))


def load_draft_heads(folder: Path) -> DraftHeads:
    """The heads in a model's folder."""
    stored = load_tensors(folder / FILE)
    try:
        heads = DraftHeads(stored["blocks.0.weight"].shape[1], len(stored) // 2)
        heads.load_state_dict(stored)
    except (KeyError, RuntimeError):
        raise TriviumError(f"{folder / FILE} holds no draft heads; train some with `draft_heads`.") from None
    return heads
