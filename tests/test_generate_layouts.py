"""How a float32 model's matrices are held: as FBGEMM, oneDNN or BLAS reads them, with the same numbers."""

import pytest
import torch
from test_generate_plan import HAS_KERNELS, KINDS, model_of, read_and_step

from trivium.generate import exactness, forward, matrices
from trivium.generate.exactness import BIT_EXACT, VerifiedSizes
from trivium.generate.forward import FusedForward
from trivium.generate.matrices import layouts
from trivium.generate.packed import HalfMatrix, has_16_bits, reordered, reordered_product
from trivium.model.attention import Documents

pytestmark = pytest.mark.skipif(not HAS_KERNELS, reason="only BLAS multiplies here")
LIBRARIES = ["fbgemm", "onednn"]


@pytest.fixture(autouse=True)
def small_models_are_packed_too(monkeypatch, tmp_path):
    monkeypatch.setenv("TRIVIUM_CACHE", str(tmp_path))
    monkeypatch.setattr(matrices, "LEAST_WIDTH", 1)
    monkeypatch.setattr(matrices, "LEAST_REORDERED", 1)
    monkeypatch.setattr(matrices, "onednn_is_faster", lambda: True)
    monkeypatch.setattr(forward, "WIDEST_REORDERED", 32)
    exactness._probed.cache_clear()
    yield
    exactness._probed.cache_clear()


def model_for(layout, **changes):
    """A model in float32 whose weights have 16 bits, or all of theirs."""
    model = model_of(**changes)
    return model.to(torch.bfloat16).float() if layout == "fbgemm" else model


@pytest.mark.quick_cases(16)
@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LIBRARIES)
@pytest.mark.parametrize("alone", [False, True])
def test_every_library_computes_what_the_modules_do(kind, layout, alone):
    model = model_for(layout, **KINDS[kind])
    plan = FusedForward(model, alone=alone)
    assert plan.layout == layout
    texts = [torch.randint(61, (length,)).tolist() for length in (21, 40, 2)[: 1 if alone else 3]]
    for text, found in zip(texts, read_and_step(model, plan.forward, texts), strict=True):
        expected = model(torch.tensor(text), Documents([len(text)]))
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)
        torch.testing.assert_close(plan.logits(found), model.logits(expected), atol=1e-4, rtol=0)


@torch.inference_mode()
@pytest.mark.parametrize("kind", ["grouped", "full-norm-after", "biased"])
@pytest.mark.parametrize("layout", LIBRARIES)
def test_a_row_has_the_same_bits_among_others_in_every_library(kind, layout):
    model = model_for(layout, **KINDS[kind])
    plan = FusedForward(model)
    assert plan.exactness.promise == BIT_EXACT
    texts = [torch.randint(61, (length,)).tolist() for length in (33, 5, 100, 64, 17, 90, 2, 50)]
    for count in (8, 5, 3):
        together = read_and_step(model, plan.forward, texts[:count])
        scores = plan.logits(torch.stack([text[-1] for text in together]))
        for text, expected, its_scores in zip(texts, together, scores, strict=False):
            alone = read_and_step(model, plan.forward, [text])[0]
            assert torch.equal(alone, expected)
            assert torch.equal(plan.logits(alone[-1:])[0], its_scores)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["grouped", "biased"])
def test_weights_that_an_optimiser_changed_are_held_as_they_now_can_be(kind):
    model, text = model_for("fbgemm", **KINDS[kind]), torch.randint(61, (30,)).tolist()
    plan, found, ways = FusedForward(model), [], []
    for change in (1.0, 1.1, None):
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16().float()) if change is None else parameter.mul_(change)
        plan.refresh_if_changed()
        ways.append(plan.layout)
        found += read_and_step(model, plan.forward, [text])
        torch.testing.assert_close(found[-1], model(torch.tensor(text), Documents([30])), atol=2e-5, rtol=0)
        torch.testing.assert_close(plan.logits(found[-1]), model.logits(found[-1]), atol=1e-4, rtol=0)
    assert ways == ["fbgemm", "onednn", "fbgemm"]
    assert (found[0] - found[1]).abs().max() > 1e-3


@pytest.mark.parametrize("wrong", ["reordered_product", "HalfMatrix"])
def test_a_library_that_sums_rows_unlike_is_not_used(wrong, monkeypatch):
    """As if it took another kernel for every number of rows."""
    layout = "fbgemm" if wrong == "HalfMatrix" else "onednn"

    def unlike(rows, product):
        return product * (1 + torch.arange(len(rows))[:, None] * 1e-6)

    class Unlike(HalfMatrix):
        def product(self, rows):
            return unlike(rows, super().product(rows))

    found = (
        Unlike if wrong == "HalfMatrix" else lambda rows, blocks: unlike(rows, rows @ blocks.to_dense().t())
    )
    monkeypatch.setattr(exactness, wrong, found)
    model = model_for(layout)
    assert layouts(model)[0] == layout
    assert FusedForward(model).layout == {"fbgemm": "onednn", "onednn": "blas"}[layout]


def test_one_weight_of_more_than_16_bits_keeps_a_model_in_float32():
    assert layouts(model_for("onednn")) == ["onednn", "blas"]
    for path in ("layers.0.attention.query", "layers.2.mlp.down", "head"):
        model = model_for("fbgemm")
        assert layouts(model) == ["fbgemm", "onednn", "blas"]
        with torch.no_grad():
            model.get_submodule(path).weight[-1, -1] = 1 + 2**-12
        assert layouts(model) == ["onednn", "blas"]


def test_which_weights_16_bits_hold():
    numbers = torch.randn(40, 24)
    assert not has_16_bits(numbers)
    for dtype in (torch.bfloat16, torch.float16):
        assert has_16_bits(numbers.to(dtype).float())
        assert has_16_bits((numbers * 1e-6).to(dtype).float())
    for wrong in (torch.inf, -torch.inf, torch.nan):
        damaged = numbers.bfloat16().float()
        damaged[3, 5] = wrong
        assert not has_16_bits(damaged)


def test_weights_far_from_one_keep_their_bits_in_float16():
    """Float16 ends at 65504 and has no numbers below 2^-24; bfloat16's range is that of float32."""
    sizes = torch.tensor([1e-30, 1e-8, 1.0, 1e8, 1e30])[:, None]
    small = torch.tensor([1.0, 1e-4, 1e-8]).repeat(8)
    weight = (torch.randn(5, 24) * sizes * small).bfloat16()
    found = HalfMatrix([weight]).product(torch.eye(24)).t()
    assert (found - weight.float()).abs().div(weight.float().abs().amax(1, keepdim=True)).max() < 2.0**-38
    assert torch.equal(found[:, small > 1e-8], weight.float()[:, small > 1e-8])
    assert HalfMatrix([torch.zeros(3, 8)]).product(torch.ones(2, 8)).eq(0).all()


def test_a_matrix_in_onednns_blocks_is_the_matrix():
    weight, rows = torch.randn(48, 33), torch.randn(7, 33)
    torch.testing.assert_close(reordered_product(rows, reordered(weight)), rows @ weight.t())


def test_one_read_of_a_matrix_comes_before_little_padding():
    rows = VerifiedSizes((1, 2, 4, 6, 12, 16, 64))
    pieces = {
        count: [cut.stop - cut.start for cut in rows.cuts(rows.padded(count))] for count in (5, 9, 17, 30)
    }
    assert pieces == {5: [6], 9: [12], 17: [16, 1], 30: [16, 12, 2]}
