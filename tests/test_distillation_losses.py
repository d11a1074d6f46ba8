"""Distillation losses against TRL's GKD trainer and against plain formulas, values and gradients."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from small import VOCABULARY, SmallBatches, small_model

from trivium.data.rows import collate
from trivium.learn.objectives.distillation import LOGPROBS, TOKENS, Distillation
from trivium.learn.objectives.distillation_losses import (
    DistillationNumbers,
    LiveTeacher,
    StoredTeacher,
    fused_distillation,
    with_rest,
)
from trivium.model.attention import Documents

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
PLACES, WIDTH, THEIRS, TOKENS_KNOWN = 13, 5, 7, 11


def case(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype)

    hidden, head = drawn(PLACES, WIDTH).requires_grad_(), drawn(TOKENS_KNOWN, WIDTH).requires_grad_()
    teacher = drawn(PLACES, THEIRS), drawn(TOKENS_KNOWN, THEIRS)
    targets = torch.randint(0, TOKENS_KNOWN, (PLACES,), generator=generator)
    weights = torch.rand(PLACES, generator=generator, dtype=dtype)
    return hidden, head, teacher, targets, weights


def by_formula(p, q, loss, b):
    """The divergence of probabilities [places, outcomes], with no logarithm left to a library."""
    if loss == "forward_kl":
        return (p * (p / q).log()).sum(-1)
    if loss == "reverse_kl":
        return (q * (q / p).log()).sum(-1)
    m = b * p + (1 - b) * q
    return b * (p * (p / m).log()).sum(-1) + (1 - b) * (q * (q / m).log()).sum(-1)


@pytest.mark.parametrize("chunk", [1, 4, 100])
@pytest.mark.parametrize("soft_cap", [None, 2.0])
@pytest.mark.parametrize(("loss", "b"), [("forward_kl", 0.5), ("reverse_kl", 0.5), ("js", 0.5), ("js", 0.1)])
def test_loss_and_gradients_are_the_formulas(loss, b, soft_cap, chunk):
    hidden, head, (theirs, their_head), targets, weights = case()
    numbers = DistillationNumbers(loss, b, temperature=1.7, label_weight=0.3, z_loss=0.02)
    found = fused_distillation(
        hidden, head, LiveTeacher(theirs, their_head, 1.7, soft_cap), targets, weights, numbers,
        soft_cap=soft_cap, chunk=chunk,
    )  # fmt: skip
    gradients = torch.autograd.grad(found.sum * 0.37, [hidden, head])

    def capped(logits):
        return logits if soft_cap is None else soft_cap * torch.tanh(logits / soft_cap)

    ours, taught = capped(hidden @ head.t()), capped(theirs @ their_head.t())
    apart = by_formula((taught / 1.7).softmax(-1), (ours / 1.7).softmax(-1), loss, b)
    labels = torch.nn.functional.cross_entropy(ours, targets, reduction="none")
    expected = ((0.7 * apart + 0.3 * labels + 0.02 * ours.logsumexp(-1) ** 2) * weights).sum()
    torch.testing.assert_close(found.sum, expected)
    for one, other in zip(gradients, torch.autograd.grad(expected * 0.37, [hidden, head]), strict=True):
        torch.testing.assert_close(one, other)
    torch.testing.assert_close(found.divergence, apart.detach())
    torch.testing.assert_close(found.cross_entropy, labels.detach())
    assert torch.equal(found.agrees, ours.argmax(-1) == taught.argmax(-1))
    assert torch.equal(found.correct, ours.argmax(-1) == targets)


@pytest.mark.parametrize(("loss", "b"), [("forward_kl", 0.5), ("reverse_kl", 0.5), ("js", 0.3)])
def test_what_is_not_among_the_stored_tokens_is_one_outcome(loss, b):
    """k tokens and a rest: the divergence of both distributions brought to k + 1 outcomes."""
    hidden, head, (theirs, their_head), targets, weights = case()
    scores = (theirs @ their_head.t() / 1.3).log_softmax(-1)
    tokens = scores.topk(4, -1).indices
    stored = StoredTeacher(tokens.to(torch.int32), with_rest(scores, tokens))
    numbers = DistillationNumbers(loss, b, temperature=1.3)
    found = fused_distillation(hidden, head, stored, targets, weights, numbers, chunk=5)
    gradients = torch.autograd.grad(found.sum, [hidden, head])

    def outcomes(probabilities):
        kept = probabilities.gather(1, tokens)
        return torch.cat((kept, 1 - kept.sum(1, keepdim=True)), 1)

    p, q = outcomes(scores.exp()), outcomes((hidden @ head.t() / 1.3).softmax(-1))
    torch.testing.assert_close(p.sum(-1), torch.ones(PLACES, dtype=p.dtype))
    expected = (by_formula(p, q, loss, b) * weights).sum()
    torch.testing.assert_close(found.sum, expected)
    for one, other in zip(gradients, torch.autograd.grad(expected, [hidden, head]), strict=True):
        torch.testing.assert_close(one, other)
    whole = by_formula(scores.exp(), (hidden @ head.t() / 1.3).softmax(-1), loss, b)
    assert (found.divergence <= whole + 1e-12).all()
    assert torch.equal(found.agrees, (hidden @ head.t()).argmax(-1) == (theirs @ their_head.t()).argmax(-1))


def test_all_tokens_but_one_are_the_whole_distribution():
    hidden, head, (theirs, their_head), targets, weights = case()
    scores = (theirs @ their_head.t()).log_softmax(-1)
    tokens = scores.topk(TOKENS_KNOWN - 1, -1).indices
    both = [
        fused_distillation(hidden, head, teacher, targets, weights, DistillationNumbers())
        for teacher in (LiveTeacher(theirs, their_head), StoredTeacher(tokens, with_rest(scores, tokens)))
    ]
    torch.testing.assert_close(both[0].sum, both[1].sum)
    torch.testing.assert_close(
        torch.autograd.grad(both[0].sum, hidden), torch.autograd.grad(both[1].sum, hidden)
    )


def test_a_sure_teacher_leaves_a_rest_that_is_not_rounded_away():
    scores = torch.tensor([[40.0, 0.0, -1.0, -2.0]]).log_softmax(-1)
    rest = with_rest(scores, torch.tensor([[0]]))[0, 1]
    expected = torch.tensor([0.0, -1.0, -2.0]).logsumexp(0) - 40.0
    torch.testing.assert_close(rest, expected)


def test_no_tensor_of_all_places_and_all_tokens_is_made():
    """Two chunks at most live at once, whatever the number of places."""
    from torch.utils._python_dispatch import TorchDispatchMode

    vocabulary, places, chunk = 512, 256, 32
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                largest = max(largest, result.numel())
            return result

    hidden, head = torch.randn(places, 8, requires_grad=True), torch.randn(vocabulary, 8, requires_grad=True)
    teacher = LiveTeacher(torch.randn(places, 8), torch.randn(vocabulary, 8))
    targets, weights = torch.randint(0, vocabulary, (places,)), torch.ones(places)
    with Watch():
        numbers = DistillationNumbers("js")
        fused_distillation(hidden, head, teacher, targets, weights, numbers, chunk=chunk).sum.backward()
    assert largest == 2 * chunk * vocabulary or largest == chunk * vocabulary


# the objective, on packed rows


def rows():
    return SmallBatches().rows(0)


def whole_logits(model, batch):
    return model.logits(model(batch.tokens, Documents(batch.lengths, batch.tokens.device)))


@pytest.mark.parametrize(
    ("loss", "beta"), [("forward_kl", 0.0), ("reverse_kl", 1.0), ("js", 0.5), ("js", 0.2)]
)
@pytest.mark.parametrize("temperature", [1.0, 0.9, 2.0])
def test_it_is_the_loss_of_trls_gkd_trainer(loss, beta, temperature):
    """The same batch with padding and labels of -100: loss, and the gradient of every weight."""
    pytest.importorskip("trl")
    from trl.experimental.gkd import GKDTrainer

    student, teacher = small_model(seed=1), small_model(seed=2, width=48, layers=3)
    batch = collate(rows())
    objective = Distillation(teacher, DistillationNumbers(loss, beta or 0.5, temperature))
    weights = batch.weights
    total = objective.loss(student, batch)
    value = total.sum / weights.sum()
    ours = torch.autograd.grad(value, list(student.parameters()))

    longest = max(batch.lengths)
    shape = (len(batch.lengths), longest)
    labels = torch.full(shape, -100)
    logits = [torch.zeros(*shape, VOCABULARY) for _ in range(2)]
    for side, model in enumerate((student, teacher)):
        start = 0
        found = whole_logits(model, batch)
        for number, length in enumerate(batch.lengths):
            logits[side][number, :length] = found[start : start + length]
            learned = weights[start : start + length] > 0
            labels[number, :length][learned] = batch.targets[start : start + length][learned]
            start += length
    theirs = GKDTrainer.generalized_jsd_loss(*logits, labels=labels, beta=beta, temperature=temperature)
    torch.testing.assert_close(value, theirs, rtol=1e-5, atol=1e-6)
    expected = torch.autograd.grad(theirs, list(student.parameters()))
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_a_student_that_is_its_teacher_has_nothing_to_learn():
    model = small_model()
    found = Distillation(small_model(), DistillationNumbers("reverse_kl")).loss(model, collate(rows()))
    assert float(found.sum) == pytest.approx(0, abs=1e-4)
    total, weight = found.metrics["teacher_agreement"]
    assert float(total) == pytest.approx(float(weight))


@pytest.mark.parametrize("width", [32, 48])
def test_hidden_states_are_compared_in_the_teachers_width(width):
    from trivium.stages.parts.teachers import projection

    student, teacher = small_model(seed=1), small_model(seed=2, width=width)
    batch = collate(rows())
    matrix = projection(student, teacher, seed=3)
    assert (matrix is None) == (width == 32)
    numbers = DistillationNumbers(label_weight=0.25)
    objective = Distillation(teacher, numbers, hidden_states=True, projection=matrix)
    documents = Documents(batch.lengths)
    mine, theirs = student(batch.tokens, documents), teacher(batch.tokens, documents)
    mine = mine if matrix is None else mine @ matrix.weight.t()
    apart = ((mine - theirs) ** 2).mean(-1)
    scores = whole_logits(student, batch).log_softmax(-1)
    labels = -scores.gather(1, batch.targets.clamp(min=0)[:, None])[:, 0]
    expected = ((0.75 * apart + 0.25 * labels) * batch.weights).sum()
    found = objective.loss(student, batch)
    torch.testing.assert_close(found.sum, expected, rtol=1e-5, atol=1e-4)
    parameters = [*student.parameters(), *([] if matrix is None else matrix.parameters())]
    for one, other in zip(
        torch.autograd.grad(found.sum, parameters), torch.autograd.grad(expected, parameters), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_stored_columns_are_read_at_the_places_they_belong_to():
    student, teacher = small_model(seed=1), small_model(seed=2)
    batch = collate(rows())
    live = Distillation(teacher, DistillationNumbers()).loss(student, batch)
    with torch.no_grad():
        scores = whole_logits(teacher, batch).log_softmax(-1)
    tokens = scores.topk(VOCABULARY - 1, -1).indices
    batch.columns |= {TOKENS: tokens.to(torch.int32), LOGPROBS: with_rest(scores, tokens)}
    stored = Distillation(None, DistillationNumbers()).loss(student, batch)
    torch.testing.assert_close(live.sum, stored.sum, rtol=1e-5, atol=1e-5)


def test_rows_of_padding_are_left_out_of_the_comparison():
    """Families pad one vocabulary to different numbers of rows: only what both have is compared."""
    student, teacher = small_model(seed=1), small_model(seed=2, vocabulary=VOCABULARY + 8)
    numbers = DistillationNumbers("js")
    batch = collate(rows())
    found = Distillation(teacher, numbers, vocabulary=VOCABULARY).loss(student, batch)
    p = whole_logits(teacher, batch)[:, :VOCABULARY].softmax(-1)
    q = whole_logits(student, batch).softmax(-1)
    expected = (by_formula(p, q, "js", 0.5) * batch.weights).sum()
    torch.testing.assert_close(found.sum, expected, rtol=1e-5, atol=1e-5)
    # The other way round the student's gradient has a place for its padding, and nothing in it.
    found = Distillation(student, numbers, vocabulary=VOCABULARY).loss(teacher, batch)
    (gradient,) = torch.autograd.grad(found.sum, [teacher.head_weight])
    assert gradient.shape[0] == VOCABULARY + 8


def test_a_shuffled_vocabulary_gives_tokens_each_others_scores():
    student, teacher = small_model(seed=1), small_model(seed=2)
    permutation = torch.from_numpy(np.random.default_rng(0).permutation(VOCABULARY))
    batch = collate(rows())
    found = Distillation(teacher, DistillationNumbers(), permutation=permutation).loss(student, batch)
    p = whole_logits(teacher, batch)[:, permutation].softmax(-1)
    expected = (
        by_formula(p, whole_logits(student, batch).softmax(-1), "forward_kl", 0.5) * batch.weights
    ).sum()
    torch.testing.assert_close(found.sum, expected, rtol=1e-5, atol=1e-5)
