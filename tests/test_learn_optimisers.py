"""Muon and AdamW against torch's own, and what groups, decay and saved state must do."""

import pytest
import torch

from trivium.learn import optimisers
from trivium.learn.optimisers import LearningRates, Optimiser, group_of, orthogonalised

RATES = LearningRates(matrices=0.02, embeddings=0.03, head=0.004, scalars=0.01, weight_decay=0.1)


def parameters(seed: int = 0) -> dict[str, torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "embedding.weight": (11, 8),
        "layers.0.attention.query.weight": (8, 8),
        "layers.1.attention.query.weight": (8, 8),
        "layers.0.mlp.up.weight": (24, 8),
        "layers.0.mlp.down.weight": (8, 24),
        "norm.weight": (8,),
        "head.weight": (11, 8),
    }
    return {
        name: torch.nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in shapes.items()
    }


def give_gradients(named: dict[str, torch.nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in named.values():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def test_parameters_fall_into_groups_by_what_they_are() -> None:
    groups = {name: group_of(name, parameter) for name, parameter in parameters().items()}
    assert groups["embedding.weight"] == "embeddings"
    assert groups["head.weight"] == "head"
    assert groups["norm.weight"] == "scalars"
    assert groups["layers.0.mlp.up.weight"] == "matrices"


def test_adamw_equals_torch_over_twenty_steps() -> None:
    ours, theirs = parameters(), parameters()
    rates = LearningRates(0.02, 0.02, 0.02, 0.02, weight_decay=0.0, epsilon=1e-8)
    optimiser = Optimiser(ours, rates, muon=False)
    reference = torch.optim.AdamW(theirs.values(), lr=0.02, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    for step in range(20):
        give_gradients(ours, step)
        give_gradients(theirs, step)
        optimiser.step(1.0)
        reference.step()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=1e-6)


def test_decay_shrinks_matrices_and_head_as_torch_does_and_spares_the_rest() -> None:
    ours, theirs, untouched = parameters(), parameters(), parameters()
    rates = LearningRates(0.02, 0.02, 0.02, 0.02, weight_decay=0.1, epsilon=1e-8)
    optimiser = Optimiser(ours, rates, muon=False)
    decayed = torch.optim.AdamW(theirs.values(), lr=0.02, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    plain = torch.optim.AdamW(untouched.values(), lr=0.02, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    for step in range(5):
        for named in (ours, theirs, untouched):
            give_gradients(named, step)
        for one in (decayed, plain):
            one.step()
        optimiser.step(1.0)
    for name in ours:
        expected = untouched if group_of(name, ours[name]) in ("scalars", "embeddings") else theirs
        torch.testing.assert_close(ours[name], expected[name], rtol=1e-5, atol=1e-6)


def test_orthogonalised_matrices_have_singular_values_near_one_and_keep_their_directions() -> None:
    torch.manual_seed(0)
    stack = torch.randn(3, 24, 8)
    moves = orthogonalised(stack)
    values = torch.linalg.svdvals(moves)
    assert float(values.min()) > 0.6
    assert float(values.max()) < 1.3
    left, _, right = torch.linalg.svd(stack, full_matrices=False)
    overlap = torch.einsum("nij,nij->n", moves, left @ right) / 8
    assert float(overlap.min()) > 0.8


def test_muon_equals_torch_muon_computed_in_float32() -> None:
    """torch.optim.Muon iterates in bfloat16, so moves agree in direction and size, not in the last digits."""
    names = ["layers.0.attention.query.weight", "layers.0.mlp.up.weight", "layers.0.mlp.down.weight"]
    ours = {name: parameter for name, parameter in parameters().items() if name in names}
    theirs = {name: torch.nn.Parameter(parameter.detach().clone()) for name, parameter in ours.items()}
    start = {name: parameter.detach().clone() for name, parameter in ours.items()}
    optimiser = Optimiser(ours, LearningRates(0.02, 0.02, 0.02, 0.02), muon=True)
    reference = torch.optim.Muon(theirs.values(), lr=0.02, momentum=0.95, nesterov=True, weight_decay=0.0)
    for step in range(3):
        give_gradients(ours, step)
        give_gradients(theirs, step)
        optimiser.step(1.0)
        reference.step()
    for name in names:
        moved, expected = (ours[name] - start[name]).detach(), (theirs[name] - start[name]).detach()
        assert float(torch.cosine_similarity(moved.flatten(), expected.flatten(), dim=0)) > 0.999
        assert float(moved.norm() / expected.norm()) == pytest.approx(1.0, abs=0.02)


def test_a_matrix_steps_the_same_alone_and_among_others_of_its_shape() -> None:
    together, alone = parameters(), parameters()
    alone = {"layers.1.attention.query.weight": alone["layers.1.attention.query.weight"]}
    first, second = Optimiser(together, RATES, muon=True), Optimiser(alone, RATES, muon=True)
    give_gradients(together, 1)
    alone["layers.1.attention.query.weight"].grad = together["layers.1.attention.query.weight"].grad.clone()
    first.step(1.0)
    second.step(1.0)
    name = "layers.1.attention.query.weight"
    torch.testing.assert_close(together[name], alone[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("muon", [True, False])
def test_a_saved_state_goes_on_bit_for_bit(muon: bool) -> None:
    whole, halved = parameters(), parameters()
    straight = Optimiser(whole, RATES, muon=muon)
    before = Optimiser(halved, RATES, muon=muon)
    for step in range(6):
        give_gradients(whole, step)
        straight.step(1.0 - step / 10)
        if step == 3:
            after = Optimiser(halved, RATES, muon=muon)
            after.restore({name: tensor.clone() for name, tensor in before.state().items()})
            before = after
        give_gradients(halved, step)
        before.step(1.0 - step / 10)
    for name in whole:
        assert torch.equal(whole[name], halved[name]), name


def test_moments_of_another_shape_are_named_and_left_fresh() -> None:
    optimiser = Optimiser(parameters(), RATES, muon=True)
    saved = {name: tensor.clone() for name, tensor in optimiser.state().items()}
    saved["first.head.weight"] = torch.zeros(15, 8)
    assert optimiser.restore(saved).fresh == ["head.weight"]


ADAM = LearningRates(0.02, 0.02, 0.02, 0.02, weight_decay=0.0, epsilon=1e-8)


def after_five_steps(named: dict[str, torch.nn.Parameter]) -> tuple[dict, torch.optim.Optimizer]:
    """Our saved state and torch's AdamW, after the same five steps from the same weights."""
    ours = {name: torch.nn.Parameter(parameter.detach().clone()) for name, parameter in named.items()}
    optimiser = Optimiser(ours, ADAM, muon=False)
    theirs = torch.optim.AdamW(named.values(), lr=0.02, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    for step in range(5):
        give_gradients(ours, step)
        give_gradients(named, step)
        optimiser.step(1.0)
        theirs.step()
    return optimiser.state(), theirs


def test_moments_that_begin_anew_are_corrected_from_their_own_first_step() -> None:
    """Torch counts the steps of every parameter apart: those that begin move by the full rate at once."""
    theirs = parameters()
    saved, reference = after_five_steps(theirs)
    ours = {name: torch.nn.Parameter(parameter.detach().clone()) for name, parameter in theirs.items()}
    for name in ("norm.weight", "layers.0.mlp.up.weight"):
        del saved[f"second.{name}"], reference.state[theirs[name]]
    optimiser = Optimiser(ours, ADAM, muon=False)
    found = optimiser.restore(saved)
    assert sorted(found.fresh) == ["layers.0.mlp.up.weight", "norm.weight"]
    assert len(found.kept) == len(ours) - 2
    for step in (7, 8):
        give_gradients(ours, step)
        give_gradients(theirs, step)
        optimiser.step(1.0)
        reference.step()
        for name in ours:
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=1e-6)


def test_what_began_anew_is_still_counted_apart_after_a_stop() -> None:
    """The number of updates behind each second moment is saved, not the optimiser's steps for all."""
    ours = parameters()
    saved, _ = after_five_steps(ours)
    del saved["second.norm.weight"]
    whole, halved = (
        {name: torch.nn.Parameter(parameter.detach().clone()) for name, parameter in ours.items()}
        for _ in range(2)
    )
    straight, before = Optimiser(whole, ADAM, muon=False), Optimiser(halved, ADAM, muon=False)
    for optimiser in (straight, before):
        assert optimiser.restore(saved).fresh == ["norm.weight"]
    for step in range(4):
        if step == 2:
            after = Optimiser(halved, ADAM, muon=False)
            after.restore({name: tensor.clone() for name, tensor in before.state().items()})
            before = after
        for named, optimiser in ((whole, straight), (halved, before)):
            give_gradients(named, step)
            optimiser.step(1.0)
    assert before.counts == straight.counts
    assert (before.counts["norm.weight"], before.counts["head.weight"]) == (4, 9)
    for name in whole:
        assert torch.equal(whole[name], halved[name]), name


def test_the_moments_of_old_rows_survive_a_vocabulary_that_grows() -> None:
    theirs = parameters()
    saved, reference = after_five_steps(theirs)
    more = torch.randn(4, 8, generator=torch.Generator().manual_seed(9))
    table = theirs["embedding.weight"]
    state = reference.state[table]
    longer = torch.nn.Parameter(torch.cat((table.detach(), more)))
    grown = torch.optim.AdamW([longer], lr=0.02, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    grown.state[longer] = {
        "step": state["step"].clone(),
        **{key: torch.cat((state[key], torch.zeros(4, 8))) for key in ("exp_avg", "exp_avg_sq")},
    }
    ours = {"embedding.weight": torch.nn.Parameter(longer.detach().clone())}
    optimiser = Optimiser(ours, ADAM, muon=False)
    assert optimiser.restore(saved).grown == ["embedding.weight"]
    ours["embedding.weight"].grad = torch.randn(15, 8, generator=torch.Generator().manual_seed(3))
    longer.grad = ours["embedding.weight"].grad.clone()
    optimiser.step(1.0)
    grown.step()
    torch.testing.assert_close(ours["embedding.weight"], longer, rtol=1e-5, atol=1e-6)


def test_adamw_takes_no_matrix_over_from_muon() -> None:
    muon = Optimiser(parameters(), RATES, muon=True)
    give_gradients(muon.parameters, 0)
    muon.step(1.0)
    adamw = Optimiser(parameters(), ADAM, muon=False)
    found = adamw.restore(muon.state())
    assert {group_of(name, adamw.parameters[name]) for name in found.fresh} == {"matrices"}
    assert not any(adamw.first[name].any() for name in found.fresh)


def test_a_parameter_without_a_gradient_stays() -> None:
    named = parameters()
    optimiser = Optimiser(named, RATES, muon=True)
    before = named["norm.weight"].detach().clone()
    give_gradients(named, 0)
    named["norm.weight"].grad = None
    optimiser.step(1.0)
    assert torch.equal(named["norm.weight"], before)


@pytest.mark.slow
def test_newton_schulz_can_be_compiled_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """One program for each shape, without a graph break; what a GPU runs, here with torch's own kernels."""
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    compiled = torch.compile(optimisers.newton_schulz, dynamic=False, backend="aot_eager", fullgraph=True)
    torch.manual_seed(0)
    for shape in ((3, 8, 12), (2, 8, 8), (3, 8, 12)):
        stack = torch.randn(shape)
        expected = optimisers.newton_schulz(stack, torch.float32)
        torch.testing.assert_close(compiled(stack, torch.float32), expected)
    assert counters["stats"]["unique_graphs"] == 2
    torch._dynamo.reset()
