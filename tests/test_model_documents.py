"""Who may look at whom: L4, and the hand-written operations against plain formulas."""

import pytest
import torch
import torch.nn.functional as F

from trivium.model import operations
from trivium.model.attention import Documents, padded_length
from trivium.model.config import ExpertsConfig, ModelConfig
from trivium.model.experts import Mixture
from trivium.model.initialise import new_model

CONFIG = ModelConfig(50, 64, 3, 4, 96, 128, key_value_heads=2, query_key_norm="head")
LENGTHS = [(5, 9, 30, 30, 1), (16, 16, 16), (40, 3), (7,)]


def lively(config: ModelConfig) -> torch.nn.Module:
    """A model whose every weight matters (new models start with zero outputs)."""
    model = new_model(config)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


VARIANTS = {
    "plain": CONFIG,
    "window": CONFIG.changed(windows=(6, None, 17)),
    "soft-cap": CONFIG.changed(attention_soft_cap=2.0),
    "no-positions": CONFIG.changed(positions="none"),
    "learned": CONFIG.changed(positions="learned"),
}


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_changing_one_document_leaves_the_others_bit_identical(variant, lengths):
    model = lively(VARIANTS[variant])
    documents = [torch.randint(0, 50, (length,)) for length in lengths]
    for changed in range(len(documents)):
        others = list(documents)
        others[changed] = (others[changed] + 1) % 50
        before = model(torch.cat(documents), Documents(lengths)).split(lengths)
        after = model(torch.cat(others), Documents(lengths)).split(lengths)
        for index, (old, new) in enumerate(zip(before, after, strict=True)):
            assert torch.equal(old, new) == (index != changed)


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_packed_documents_equal_documents_alone(variant, lengths):
    model = lively(VARIANTS[variant])
    documents = [torch.randint(0, 50, (length,)) for length in lengths]
    packed = model(torch.cat(documents), Documents(lengths)).split(lengths)
    for document, together in zip(documents, packed, strict=True):
        alone = model(document, Documents([len(document)]))
        torch.testing.assert_close(together, alone, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_token_sees_the_next(variant):
    model = lively(VARIANTS[variant])
    first = torch.randint(0, 50, (33,))
    second = first.clone()
    second[20:] = (second[20:] + 1) % 50
    old, new = model(first, Documents([33])), model(second, Documents([33]))
    assert torch.equal(old[:20], new[:20])
    assert not torch.equal(old[20], new[20])


def test_a_window_ends_where_it_says():
    model = lively(CONFIG.changed(layers=1, windows=(4,), positions="none"))
    tokens = torch.randint(0, 50, (12,))
    for gone, seen in [(7, False), (8, True)]:
        other = tokens.clone()
        other[gone] = (other[gone] + 1) % 50
        same = torch.equal(model(tokens, Documents([12]))[11], model(other, Documents([12]))[11])
        assert same != seen


def test_gradients_of_mixed_lengths_are_those_of_documents_alone():
    model, lengths = lively(CONFIG), (5, 30, 29, 1)
    documents = [torch.randint(0, 50, (length,)) for length in lengths]
    model(torch.cat(documents), Documents(lengths)).square().sum().backward()
    packed = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    model.zero_grad()
    for document in documents:
        model(document, Documents([len(document)])).square().sum().backward()
    alone = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    for together, apart in zip(packed, alone, strict=True):
        torch.testing.assert_close(together, apart, atol=1e-4, rtol=1e-4)


def test_padding_is_at_most_an_eighth_of_a_long_document():
    for length in range(1, 5000):
        padded = padded_length(length)
        assert length <= padded <= max(-(-length // 16) * 16, length * 1.125)
    assert len({padded_length(length) for length in range(1, 5000)}) < 90


def test_positions_may_be_given():
    model = lively(CONFIG)
    tokens = torch.randint(0, 50, (10,))
    shifted = Documents([10], positions=torch.arange(10) + 57)
    # Rotary attention depends on distances alone.
    torch.testing.assert_close(model(tokens, Documents([10])), model(tokens, shifted), atol=1e-4, rtol=1e-4)
    skipped = Documents([10], positions=torch.arange(10) * 3)
    assert (model(tokens, Documents([10])) - model(tokens, skipped)).abs().max() > 1e-3


def gradients(function, *inputs):
    leaves = [value.detach().clone().requires_grad_() for value in inputs]
    result = function(*leaves)
    results = result if isinstance(result, tuple) else (result,)
    torch.manual_seed(1)
    sum((part * torch.randn_like(part)).sum() for part in results).backward()
    return [*results, *(leaf.grad for leaf in leaves)]


def same(ours, plain):
    for one, other in zip(ours, plain, strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=2e-4)


def test_norm_by_hand():
    rows, weight = torch.randn(6, 3, 40) * 5 + 1, torch.randn(40)
    same(
        gradients(lambda rows, weight: operations.normalise(rows, weight, 1e-5), rows, weight),
        gradients(lambda rows, weight: F.rms_norm(rows, (40,), weight, 1e-5), rows, weight),
    )


def test_rotation_by_hand():
    heads, cosine, sine = torch.randn(7, 3, 8), torch.randn(7, 1, 4), torch.randn(7, 1, 4)

    def plain(heads):
        turned = torch.cat((-heads[..., 4:], heads[..., :4]), -1)
        return heads * torch.cat((cosine, cosine), -1) + turned * torch.cat((sine, sine), -1)

    same(gradients(lambda heads: operations.rotate(heads, cosine, sine), heads), gradients(plain, heads))


def test_gated_network_by_hand():
    rows, gate, up, down = torch.randn(9, 6), torch.randn(12, 6) * 3, torch.randn(12, 6), torch.randn(6, 12)
    same(
        gradients(operations.GatedInner.apply, rows, gate, up, down),
        gradients(lambda x, gate, up, down: (F.silu(x @ gate.T) * (x @ up.T)) @ down.T, rows, gate, up, down),
    )


def test_gated_network_trains_only_what_is_asked():
    """An adapter or a frozen matrix leaves the rest of the network its gradient."""
    weights = [torch.randn(12, 6), torch.randn(12, 6), torch.randn(6, 12)]
    rows = torch.randn(9, 6, requires_grad=True)
    weights[1].requires_grad_()
    operations.GatedInner.apply(rows, *weights).sum().backward()
    given = rows.detach().requires_grad_()
    again = weights[1].detach().requires_grad_()
    ((F.silu(given @ weights[0].T) * (given @ again.T)) @ weights[2].T).sum().backward()
    torch.testing.assert_close(rows.grad, given.grad)
    torch.testing.assert_close(weights[1].grad, again.grad)
    assert weights[0].grad is None
    assert weights[2].grad is None


def test_shared_projections_by_hand():
    rows, first, second = torch.randn(9, 12), torch.randn(5, 12), torch.randn(7, 12)
    same(
        gradients(operations.SharedInput.apply, rows, first, second),
        gradients(lambda rows, one, two: (rows @ one.T, rows @ two.T), rows, first, second),
    )


def test_frozen_projections_get_no_gradient():
    model = lively(CONFIG)
    layer = model.layers[0].attention
    layer.key.weight.requires_grad_(False)
    model(torch.randint(0, 50, (10,)), Documents([10])).sum().backward()
    assert layer.key.weight.grad is None
    assert layer.query.weight.grad is not None


def test_experts_by_hand():
    experts = ExpertsConfig(5, 2, 12)
    mixture = Mixture(ModelConfig(50, 16, 1, 2, 24, 64, experts=experts), experts)
    rows = torch.randn(40, 16)
    probabilities = mixture.router(rows).softmax(-1)
    expected = torch.zeros_like(rows)
    for index, row in enumerate(rows):
        weights, chosen = probabilities[index].topk(2)
        for weight, expert in zip(weights / weights.sum(), chosen, strict=True):
            expected[index] += weight * mixture.experts[int(expert)](row[None])[0]
    torch.testing.assert_close(mixture(rows), expected, atol=1e-5, rtol=1e-4)


def test_a_half_precision_model_is_near_the_full_one():
    model = lively(CONFIG)
    tokens = torch.randint(0, 50, (60,))
    full = model.logits(model(tokens, Documents([20, 40])))
    half = model.to(torch.bfloat16)
    found = half.logits(half(tokens, Documents([20, 40])))
    assert found.dtype == torch.float32
    assert F.cosine_similarity(found.flatten(), full.flatten(), dim=0) > 0.99


def test_the_hot_path_has_no_graph_break():
    model = lively(CONFIG)
    context = Documents([16, 16])
    tokens = torch.randint(0, 50, (32,))
    explained = torch._dynamo.explain(lambda tokens: model(tokens, context))(tokens)
    assert explained.graph_break_count == 0, explained.break_reasons
    torch._dynamo.reset()
