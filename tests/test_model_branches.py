"""A prompt computed once for all its answers equals every answer by itself, values and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small import VOCABULARY, small_model

from trivium.model.attention import Documents
from trivium.model.branches import Branches

DESIGNS: dict[str, dict[str, Any]] = {
    "plain": {},
    "grouped heads": {"key_value_heads": 1},
    "window": {"windows": (5, None)},
    "soft cap": {"attention_soft_cap": 5.0},
    "learned positions": {"positions": "learned"},
    "no positions": {"positions": "none"},
}
PROMPTS, ANSWERS = (9, 1, 17), ((4, 11, 1), (6,), (20, 2, 8, 8))


def model_of(design: str) -> Any:
    return small_model(**DESIGNS[design])


@pytest.mark.parametrize("design", DESIGNS)
def test_branches_equal_whole_documents(design):
    model = model_of(design)
    generator = torch.Generator().manual_seed(0)

    def draw(count: int) -> torch.Tensor:
        return torch.randint(0, VOCABULARY, (count,), generator=generator)

    shared, whole, lengths, wholes, back = [], [], [], [], []
    kept_shared, kept_whole = [], []
    for prompt_length, answers in zip(PROMPTS, ANSWERS, strict=True):
        prompt = draw(prompt_length)
        shared.append(prompt)
        lengths.append(prompt_length)
        back.append(0)
        kept_shared += [False] * prompt_length
        for place, length in enumerate(answers, start=1):
            answer = draw(length)
            shared.append(answer)
            lengths.append(length)
            back.append(place)
            kept_shared += [True] * length
            whole.append(torch.cat((prompt, answer)))
            wholes.append(prompt_length + length)
            kept_whole += [False] * prompt_length + [True] * length
    scale = torch.randn(sum(kept_whole), model.config.width, generator=generator)
    results = []
    for tokens, context, kept in (
        (torch.cat(shared), Branches(lengths, back), kept_shared),
        (torch.cat(whole), Documents(wholes), kept_whole),
    ):
        model.zero_grad()
        hidden = model(tokens, context)[torch.tensor(kept)]
        (hidden * scale).sum().backward()
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        results.append((hidden.detach(), gradients))
    (hidden, gradients), (expected, others) = results
    torch.testing.assert_close(hidden, expected, atol=1e-5, rtol=1e-5)
    assert gradients.keys() == others.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, others[name], atol=2e-4, rtol=1e-4, msg=name)


def test_branches_do_not_see_each_other():
    model = small_model()
    tokens = torch.randint(0, VOCABULARY, (18,), generator=torch.Generator().manual_seed(1))
    context = Branches([8, 4, 6], [0, 1, 2])
    before = model(tokens, context)
    tokens[8:12] = (tokens[8:12] + 1) % VOCABULARY
    after = model(tokens, context)
    assert torch.equal(before[12:], after[12:])
    assert torch.equal(before[:8], after[:8])
    assert not torch.equal(before[8:12], after[8:12])
