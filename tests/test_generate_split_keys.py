"""The decode kernel that splits keys: torch's own attention, by formula instead of by mask."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from generating import tiny_model

from trivium.generate import split_keys
from trivium.generate.attention import NEVER, mix
from trivium.generate.split_keys import attend, score_of, splits_keys
from trivium.model.attention import Scoring

REACH = 48
POSITIONS = torch.tensor([0, 7, 30, 47])


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's compiler captures the graph; the kernels are its own."""
    split_keys._compiled.cache_clear()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    yield
    split_keys._compiled.cache_clear()


@pytest.mark.parametrize("cap", [None, 4.0])
@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("shared", [1, 4])
def test_it_is_attention_under_a_mask(plain: Any, shared: int, window: int | None, cap: float | None) -> None:
    torch.manual_seed(shared)
    query = torch.randn(4, 2, shared, 16)
    # As the cache lies: token by token, each token's keys and then its values.
    key, value = torch.randn(4, REACH, 2, 2, 16).transpose(1, 3).unbind(2)
    distance = POSITIONS[:, None] - torch.arange(REACH)
    hidden = (distance < 0) | (distance >= (window or REACH))
    mask = torch.zeros(4, REACH).masked_fill(hidden, NEVER)[:, None, None]
    expected = mix(query, key, value, mask, 0.3, cap)
    scoring = Scoring(0.3, window, cap)
    with torch.inference_mode():
        found = attend(query, key, value, score_of(POSITIONS, window, cap), scoring)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_positions_are_read_anew_and_nothing_is_compiled_again(plain: Any) -> None:
    positions = POSITIONS.clone()
    query, key, value = torch.randn(4, 2, 2, 16), torch.randn(4, 2, REACH, 16), torch.randn(4, 2, REACH, 16)
    score, scoring = score_of(positions, None, None), Scoring(0.3, None, None)
    with torch.inference_mode():
        attend(query, key, value, score, scoring)
        torch._dynamo.utils.counters.clear()
        positions.zero_()
        found = attend(query, key, value, score, scoring)
    torch.testing.assert_close(found, value[:, :, :1].expand_as(found))
    assert not torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.parametrize(
    ("design", "takes"),
    [
        ({"heads": 4, "key_value_heads": 2, "head_width": 16}, True),
        ({"heads": 6, "key_value_heads": 2, "head_width": 16}, False),
        ({"heads": 4, "key_value_heads": 2, "head_width": 24}, False),
        ({"heads": 4, "key_value_heads": 2, "head_width": 8}, False),
    ],
)
def test_which_heads_it_takes(design: dict[str, int], takes: bool) -> None:
    assert splits_keys(tiny_model().config.changed(**design)) == takes
