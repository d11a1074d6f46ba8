"""The fused head and loss against plain torch, values and gradients, in double precision."""

import pytest
import torch
import torch.nn.functional as F
from small import small_trainer

from trivium.learn import head_loss, score_terms
from trivium.learn.head_loss import fused_cross_entropy, token_log_probabilities


@pytest.fixture(autouse=True, params=["in place", "formulas"])
def way(request, monkeypatch):
    """Both ways to the terms of a chunk; what a compiler is given runs as it is."""
    if request.param == "formulas":
        monkeypatch.setattr(head_loss, "gains", lambda device: True)
        monkeypatch.setattr(head_loss, "compiled", lambda formula: formula)
    return request.param


@pytest.mark.parametrize("soft_cap", [None, 2.0])
def test_a_compiler_sees_one_graph_of_each_formula(soft_cap, monkeypatch):
    hidden, head, targets, weights = case(dtype=torch.float32, tokens=40)

    def computed():
        total = fused_cross_entropy(hidden, head, targets, weights, soft_cap=soft_cap, chunk=8).sum
        chosen, entropies = token_log_probabilities(
            hidden, head, targets, soft_cap=soft_cap, entropy=True, chunk=8
        )
        loss = total + (chosen * weights).sum() + entropies.square().sum()
        return [loss, *torch.autograd.grad(loss, [hidden, head])]

    expected = computed()
    made = {}

    def compiled(formula):
        if formula not in made:
            made[formula] = torch.compile(formula, backend="aot_eager", fullgraph=True)
        return made[formula]

    monkeypatch.setattr(head_loss, "gains", lambda device: True)
    monkeypatch.setattr(head_loss, "compiled", compiled)
    for one, other in zip(computed(), expected):
        torch.testing.assert_close(one, other)
    assert len(made) == 3


@pytest.mark.parametrize("wish", ["on", "off"])
def test_a_training_compiles_its_loss_as_it_does_its_layers(wish, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    trainer = small_trainer(tmp_path, compile=wish)
    seen, loss = [], trainer.objective.loss

    def noted(*arguments):
        seen.append(score_terms.gains(torch.device("cuda")))
        return loss(*arguments)

    monkeypatch.setattr(trainer.objective, "loss", noted)
    trainer.run()
    assert set(seen) == {wish == "on"}


def test_formulas_are_for_a_compiled_training_on_a_gpu(monkeypatch):
    assert not score_terms.gains(torch.device("cuda"))
    with score_terms.compiled_terms(True):
        assert score_terms.gains(torch.device("cuda"))
        assert not score_terms.gains(torch.device("cpu"))
    assert not score_terms.gains(torch.device("cuda"))


def case(tokens=13, width=5, vocabulary=11, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, width, generator=generator, dtype=dtype).requires_grad_()
    head = torch.randn(vocabulary, width, generator=generator, dtype=dtype).requires_grad_()
    targets = torch.randint(0, vocabulary, (tokens,), generator=generator)
    weights = torch.rand(tokens, generator=generator, dtype=dtype)
    targets[2::5] = -1
    weights[[2, 4]] = 0
    return hidden, head, targets, weights


def plain_logits(hidden, head, soft_cap):
    logits = hidden @ head.t()
    return logits if soft_cap is None else soft_cap * torch.tanh(logits / soft_cap)


@pytest.mark.parametrize("soft_cap", [None, 1.5])
@pytest.mark.parametrize("z_loss", [0.0, 0.03])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_cross_entropy_equals_plain_torch(soft_cap, z_loss, label_smoothing, chunk):
    hidden, head, targets, weights = case()
    result = fused_cross_entropy(
        hidden, head, targets, weights,
        soft_cap=soft_cap, z_loss=z_loss, label_smoothing=label_smoothing, chunk=chunk,
    )  # fmt: skip
    gradients = torch.autograd.grad(result.sum * 0.37, [hidden, head])
    logits = plain_logits(hidden, head, soft_cap)
    losses = F.cross_entropy(
        logits, targets, ignore_index=-1, reduction="none", label_smoothing=label_smoothing
    ) + z_loss * logits.logsumexp(1).square() * (targets >= 0)
    expected = (losses * weights).sum()
    torch.testing.assert_close(result.sum, expected)
    for ours, theirs in zip(gradients, torch.autograd.grad(expected * 0.37, [hidden, head])):
        torch.testing.assert_close(ours, theirs)
    learned = (targets >= 0) & (weights != 0)
    bare = F.cross_entropy(logits, targets, ignore_index=-1, reduction="none") * learned
    torch.testing.assert_close(result.token_losses, bare.detach())
    assert torch.equal(result.correct, (logits.argmax(1) == targets) & learned)


def test_cross_entropy_passes_gradcheck():
    hidden, head, targets, weights = case(tokens=5)
    torch.autograd.gradcheck(
        lambda h, w: fused_cross_entropy(h, w, targets, weights, soft_cap=2.0, z_loss=0.01, chunk=2).sum,
        (hidden, head),
    )


def test_cross_entropy_with_every_token_learned_and_frozen_inputs():
    hidden, head, targets, weights = case()
    targets, weights = targets.clamp(min=0), weights + 0.5
    expected = (F.cross_entropy(hidden @ head.t(), targets, reduction="none") * weights).sum()
    frozen_head = fused_cross_entropy(hidden, head.detach(), targets, weights).sum
    torch.testing.assert_close(frozen_head, expected)
    torch.testing.assert_close(
        torch.autograd.grad(frozen_head, hidden)[0],
        torch.autograd.grad(expected, hidden, retain_graph=True)[0],
    )
    frozen_hidden = fused_cross_entropy(hidden.detach(), head, targets, weights).sum
    torch.testing.assert_close(
        torch.autograd.grad(frozen_hidden, head)[0], torch.autograd.grad(expected, head)[0]
    )
    with torch.no_grad():
        torch.testing.assert_close(fused_cross_entropy(hidden, head, targets, weights).sum, expected)


def test_a_batch_without_a_learned_token_is_zero_and_not_nan():
    hidden, head, targets, weights = case()
    result = fused_cross_entropy(hidden, head, targets.fill_(-1), weights)
    gradients = torch.autograd.grad(result.sum, [hidden, head])
    assert result.sum.item() == 0
    assert all(bool((gradient == 0).all()) for gradient in gradients)


@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_half_precision_inputs_keep_a_float32_loss(chunk):
    """Against plain torch in float32 on the same rounded numbers: only the gradients' rounding is left."""
    hidden, head, targets, weights = case(dtype=torch.float32, tokens=40)
    halves = hidden.detach().bfloat16().requires_grad_()
    result = fused_cross_entropy(halves, head, targets, weights, chunk=chunk)
    gradients = torch.autograd.grad(result.sum, [halves, head])
    exact, rounded = halves.detach().float().requires_grad_(), head.detach().bfloat16().float()
    rounded.requires_grad_()
    losses = F.cross_entropy(exact @ rounded.t(), targets, ignore_index=-1, reduction="none")
    expected = (losses * weights).sum()
    assert result.sum.dtype == torch.float32
    torch.testing.assert_close(result.sum, expected, rtol=0.02, atol=0.0)
    assert [gradient.dtype for gradient in gradients] == [torch.bfloat16, torch.float32]
    for ours, theirs in zip(gradients, torch.autograd.grad(expected, [exact, rounded])):
        apart = torch.linalg.vector_norm(ours.float() - theirs)
        assert apart < 0.02 * torch.linalg.vector_norm(theirs)


def test_the_whole_logits_are_never_allocated():
    tokens, vocabulary, width = 512, 1024, 8
    hidden = torch.randn(tokens, width, requires_grad=True)
    head = torch.randn(vocabulary, width, requires_grad=True)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            nonlocal largest
            result = function(*arguments, **(keywords or {}))
            if isinstance(result, torch.Tensor):
                largest = max(largest, result.numel())
            return result

    targets, weights = torch.zeros(tokens, dtype=torch.int64), torch.ones(tokens)
    with Watch():
        fused_cross_entropy(hidden, head, targets, weights, chunk=64).sum.backward()
        hidden_again = hidden.detach().requires_grad_()
        chosen, _ = token_log_probabilities(hidden_again, head, targets, chunk=64, entropy=True)
        chosen.sum().backward()
    assert largest == 64 * vocabulary


@pytest.mark.parametrize("soft_cap", [None, 1.5])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_log_probabilities_and_entropy_equal_plain_torch(soft_cap, temperature, chunk):
    hidden, head, targets, _ = case()
    chosen, entropy = token_log_probabilities(
        hidden, head, targets, soft_cap=soft_cap, temperature=temperature, entropy=True, chunk=chunk
    )
    logs = F.log_softmax(plain_logits(hidden, head, soft_cap) / temperature, dim=1)
    present = targets >= 0
    expected = logs.gather(1, targets.clamp(min=0)[:, None]).squeeze(1) * present
    expected_entropy = -(logs.exp() * logs).sum(1) * present
    torch.testing.assert_close(chosen, expected)
    torch.testing.assert_close(entropy, expected_entropy)
    mixing = torch.linspace(-1, 1, len(targets), dtype=torch.float64)
    ours = torch.autograd.grad((chosen * mixing + entropy * mixing.flip(0)).sum(), [hidden, head])
    theirs = torch.autograd.grad(
        (expected * mixing + expected_entropy * mixing.flip(0)).sum(), [hidden, head]
    )
    for one, other in zip(ours, theirs):
        torch.testing.assert_close(one, other)


def test_log_probabilities_pass_gradcheck():
    hidden, head, targets, _ = case(tokens=5)
    torch.autograd.gradcheck(
        lambda h, w: token_log_probabilities(
            h, w, targets, soft_cap=2.0, temperature=0.7, entropy=True, chunk=2
        ),
        (hidden, head),
    )


def test_log_probabilities_without_entropy():
    hidden, head, targets, _ = case()
    chosen, entropy = token_log_probabilities(hidden, head, targets)
    both, _ = token_log_probabilities(hidden, head, targets, entropy=True)
    assert entropy is None
    assert torch.equal(chosen, both)
    torch.testing.assert_close(
        torch.autograd.grad(chosen.square().sum(), head)[0], torch.autograd.grad(both.square().sum(), head)[0]
    )
