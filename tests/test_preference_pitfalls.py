"""What goes wrong in other preference tools (pitfalls A, B, J, N, R, S, V), each with its test."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from judging import PAIRS, batches_of, in_order, model_and_reference, objective_of, pairs
from test_sft_pitfalls import FAMILIES, Fixed
from test_tokens_chat import STOPS
from tuning import save, small_model, tokenizer_of

from trivium.data.counted import CountedSource
from trivium.data.preferences import PreferenceBatches, PreferenceData, row_of, unpaired
from trivium.data.rows import collate
from trivium.data.sources import Document
from trivium.generate.engine import Engine
from trivium.generate.requests import Request
from trivium.generate.sampling import Sampling
from trivium.kit.metrics import MetricsLog
from trivium.kit.progress import Progress
from trivium.learn.objectives.policy_losses import kl_estimate
from trivium.learn.objectives.preference import UNPAIRED, Preference, answers_under
from trivium.learn.objectives.preference_losses import PAIR_LOSSES, Pairs, PreferenceNumbers
from trivium.learn.optimisers import LearningRates
from trivium.learn.settings import Training
from trivium.learn.trainer import Trainer
from trivium.model.attention import Documents
from trivium.stages.parts.gauges import drift_from
from trivium.tokens.tokenizer import Tokenizer

RATES = LearningRates(3e-3, 3e-3, 3e-3, 3e-3)
ASKED = [{"role": "user", "content": "the river?"}]
GOOD = [{"role": "assistant", "content": "rises in the hills"}]
BAD = [{"role": "assistant", "content": "counts"}]
SYMMETRIC = ("sigmoid", "sigmoid_norm", "cpo")


def trainer(folder, model, objective, rows, *, steps: int = 1, **options) -> Trainer:
    return Trainer(
        model=model, objective=objective, batches=Fixed(rows, steps), folder=folder, rates=RATES,
        log=MetricsLog(folder / "metrics.jsonl"), progress=Progress("test"),
        settings=Training(optimiser="adamw", compile="off", **options),
    )  # fmt: skip


@pytest.mark.parametrize("loss", [{"sigmoid": 1.0, "sft": 0.5}, {"ipo": 1.0}, {"simpo": 1.0}, {"kto": 1.0}])
def test_pitfall_a_the_gradient_does_not_depend_on_how_a_batch_is_divided(tmp_path, loss) -> None:
    """A: ragged pairs of different weights in 1, 4 or 8 passes give the same logged loss and gradient."""
    uneven = [{**row, "weight": 1 + number % 3} for number, row in enumerate(PAIRS * 2)][:8]
    results = []
    for budget in (1, 60, 10_000):
        model, reference = model_and_reference()
        objective = objective_of(loss, reference, PreferenceNumbers(beta=0.3))
        rows = in_order(batches_of(pairs(uneven), loss))
        sized = trainer(tmp_path / str(budget), model, objective, rows, micro_batch=budget)
        measures, norm = sized._gradient(rows)
        gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        logged = {name: float(total) / float(weight) for name, (total, weight) in measures.items() if weight}
        results.append((logged, norm, gradient))
    for logged, norm, gradient in results[1:]:
        assert logged["loss"] == pytest.approx(results[0][0]["loss"], rel=1e-6)
        assert logged["rewards/margins" if "kto" not in loss else "kl"] == pytest.approx(
            results[0][0]["rewards/margins" if "kto" not in loss else "kl"], rel=1e-5, abs=1e-6
        )
        assert norm == pytest.approx(results[0][1], rel=1e-5)
        torch.testing.assert_close(gradient, results[0][2], atol=1e-6, rtol=1e-5)


def test_pitfall_a_the_imitation_is_a_mean_over_tokens_and_not_of_means() -> None:
    """A: a long chosen answer counts in the sft share as much as its tokens are many."""
    model, reference = model_and_reference()
    objective = objective_of({"sft": 1.0}, reference, PreferenceNumbers())
    rows = in_order(batches_of(pairs(), {"sft": 1.0}))
    batch = collate(rows)
    found = answers_under(model, batch)
    chosen = [place for place, role in enumerate(batch.facts["role"]) if role == "chosen"]
    expected = -found.sums[chosen].sum() / found.tokens[chosen].sum()
    loss = objective.loss(model, batch).sum / objective.weight(rows)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_pitfall_b_both_answers_end_in_a_learned_stop(family: str) -> None:
    """B: the last learned token of either answer is the token that ends its turn."""
    tokenizer = tokenizer_of(family)
    rows = [{"prompt": ASKED, "chosen": GOOD, "rejected": BAD}]
    (pair,) = PreferenceData(tokenizer, 256).read([Document(None, rows[0], "1")])
    for answer in pair.completions:
        assert answer.tokens[answer.learned][-1] == tokenizer.token_id(STOPS[family])


def test_pitfall_b_a_stop_that_is_also_the_padding_is_learned() -> None:
    """B: masks go by position, so a family whose padding is its stop still learns it."""
    tokenizer = tokenizer_of("zephyr")
    same = Tokenizer(tokenizer._json, {**tokenizer.settings, "pad_token": "</s>"}, tokenizer.templates)
    row = {"prompt": ASKED, "chosen": GOOD, "rejected": BAD}
    (pair,) = PreferenceData(same, 256).read([Document(None, row, "1")])
    for answer in pair.completions:
        assert answer.tokens[answer.learned].tolist().count(same.pad_id) == 1


@pytest.mark.slow
def test_pitfall_b_a_model_that_learned_preferences_halts(tmp_path) -> None:
    """B: overfitted on four pairs it gives the chosen answer and stops by itself."""
    tokenizer = tokenizer_of("own")
    answers = {
        "the river?": "rises in the hills",
        "12?": "345 sacks",
        "and the miller?": "counts",
        "or?": "l'été",
    }
    rows = [
        {
            "prompt": [{"role": "user", "content": asked}],
            "chosen": [{"role": "assistant", "content": answer}],
            "rejected": [{"role": "assistant", "content": "the hills and the hills"}],
        }
        for asked, answer in answers.items()
    ]
    judged = list(
        PreferenceData(tokenizer, 256).read(Document(None, row, str(n)) for n, row in enumerate(rows))
    )
    batches = PreferenceBatches([CountedSource("rows", judged)], batch=4, seed=0, steps=1)
    model = small_model(tokenizer)
    objective = Preference({"cpo": 1.0, "sft": 1.0}, beside="none")
    trainer(tmp_path, model, objective, batches.rows(0), steps=120).run()
    for asked, answer in answers.items():
        ids = tokenizer.encode_chat([{"role": "user", "content": asked}], add_generation_prompt=True).ids
        ((said,),) = Engine(model, tokenizer).generate(
            [Request(ids, Sampling(temperature=0, max_new_tokens=40))]
        )
        assert (said.text, said.finish_reason) == (answer, "stop")


@pytest.mark.parametrize("positions", ["rope", "learned"])
@pytest.mark.parametrize("share", [True, False])
def test_pitfall_j_company_moves_no_position(positions: str, share: bool) -> None:
    """J: an answer is as likely alone, behind other pairs, and behind a prompt it shares."""
    model, _ = model_and_reference(positions=positions)
    judged = pairs()
    together = answers_under(model, collate([row_of(judged, share=share)]))
    roles = row_of(judged, share=share).facts["role"]
    found = together.sums[[place for place, role in enumerate(roles) if role != "prompt"]].tolist()
    expected = []
    for one in judged:
        for answer in one.completions:
            alone = row_of([type(one)(one.id, one.prompt, (answer,))], share=False)
            expected.append(answers_under(model, collate([alone])).sums.item())
    assert found == pytest.approx(expected, abs=1e-4)


@pytest.mark.slow
def test_pitfall_j_padding_on_either_side_in_transformers_is_no_padding_here(tmp_path) -> None:
    """J: with positions given, transformers finds the same log-probability padded left, right or not."""
    from transformers import AutoModelForCausalLM

    tokenizer = tokenizer_of("own")
    model = small_model(tokenizer)
    theirs = AutoModelForCausalLM.from_pretrained(save(tmp_path / "m", model, tokenizer), dtype=torch.float32)
    one = pairs()[0]
    ids = torch.tensor([*one.prompt, *one.completions[0].tokens])
    mine = answers_under(model, collate([row_of([one], share=True)])).sums[1].item()
    for left, right in ((0, 0), (7, 0), (0, 7)):
        padded = torch.cat((torch.zeros(left, dtype=torch.long), ids, torch.zeros(right, dtype=torch.long)))
        mask = torch.zeros(len(padded), dtype=torch.long)
        mask[left : left + len(ids)] = 1
        places = (mask.cumsum(0) - 1).clamp(min=0)
        with torch.no_grad():
            logits = theirs(padded[None], attention_mask=mask[None], position_ids=places[None]).logits[0]
        logprobs = logits.log_softmax(-1)[left : left + len(ids) - 1].gather(1, ids[1:, None])[:, 0]
        assert logprobs[len(one.prompt) - 1 :].sum().item() == pytest.approx(mine, abs=1e-4)


def kl(policy: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    return (policy.exp() * (policy - reference)).sum()


@pytest.mark.parametrize("off_policy", [False, True])
def test_pitfall_n_gradients_of_the_divergence_over_six_actions(off_policy: bool) -> None:
    """N: exact expectations over all actions; only the ratio times k3 is the reverse KL off policy too."""
    random = torch.Generator().manual_seed(0)
    scores = torch.randn(6, generator=random, dtype=torch.double).requires_grad_(True)
    reference = torch.randn(6, generator=random, dtype=torch.double).log_softmax(0)
    policy = scores.log_softmax(0)
    drawn = policy.detach()
    if off_policy:
        drawn = (scores.detach() + torch.randn(6, generator=random, dtype=torch.double)).log_softmax(0)

    def gradient(of: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(of, scores, retain_graph=True)[0]

    def expected(estimator: str, weighed: bool = False) -> torch.Tensor:
        value = kl_estimate(policy, reference, estimator)
        value = value * torch.exp(policy - drawn) if weighed else value
        return gradient((drawn.exp() * value).sum())

    reverse = gradient(kl(policy, reference))
    forward = gradient((reference.exp() * (reference - policy)).sum())
    near = {"atol": 1e-12, "rtol": 0}
    torch.testing.assert_close(expected("k3", weighed=True), reverse, **near)
    if off_policy:
        assert (expected("k2") - reverse).abs().max() > 1e-3
    else:
        torch.testing.assert_close(expected("k1"), torch.zeros(6, dtype=torch.double), **near)
        torch.testing.assert_close(expected("k2"), reverse, **near)
        torch.testing.assert_close(expected("k3"), forward, **near)


def test_pitfall_n_the_baseline_of_kto_has_no_gradient() -> None:
    """N: z is an estimate to compare with; the gradient is the one with z given as a number."""
    gradients = []
    for given in (False, True):
        model, reference = model_and_reference()
        objective = objective_of({"kto": 1.0}, reference, PreferenceNumbers(beta=0.3))
        rows = in_order(batches_of(pairs(), {"kto": 1.0}))
        batch = collate(rows)
        if given:
            drop = [role == "mismatched" for role in batch.facts["role"]]
            found, beside = answers_under(model, batch), answers_under(reference, batch)
            z = (found.sums - beside.sums)[drop].mean().clamp(min=0).item()
            ratios = (found.sums - beside.sums)[[role == "judged" for role in batch.facts["role"]]]
            signs = torch.tensor([1.0, -1.0] * len(PAIRS))
            (1 - torch.sigmoid(0.3 * signs * (ratios - z))).sum().backward()
        else:
            objective.loss(model, batch).sum.backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-5)


def test_pitfall_n_the_reported_drift_is_the_divergence() -> None:
    """N: of one drawn token the mean of many is the exact KL, within its interval."""
    tokenizer = tokenizer_of("own")
    model, parent = model_and_reference()
    prompt = tokenizer.encode("the river")
    with torch.no_grad():
        ids = torch.tensor(prompt)
        both = [one.logits(one(ids, Documents([len(prompt)])))[-1].log_softmax(-1) for one in (model, parent)]
    exact = kl(*both).item()
    found = drift_from(parent, model, tokenizer, [prompt] * 600, longest=1, seed=0)
    assert found["low"] - 0.02 <= exact <= found["high"] + 0.02
    assert found["value"] == pytest.approx(exact, abs=0.05)


@pytest.mark.parametrize("loss", ["sigmoid", "hinge", "ipo", "robust", "kto", "bco", "apo_zero"])
def test_pitfall_r_at_the_start_the_loss_is_what_its_paper_says(loss: str) -> None:
    """R: with the policy at its reference: DPO log 2, hinge 1, IPO 1/(2 beta) squared, KTO a half..."""
    model, _ = model_and_reference()
    same, _ = model_and_reference()
    numbers = PreferenceNumbers(beta=0.3, label_smoothing=0.1 if loss == "robust" else 0.0)
    objective = objective_of({loss: 1.0}, same, numbers)
    rows = in_order(batches_of(pairs(), {loss: 1.0}))
    value = (objective.loss(model, collate(rows)).sum / objective.weight(rows)).item()
    expected = {
        "sigmoid": math.log(2), "hinge": 1.0, "ipo": (1 / 0.6) ** 2, "robust": math.log(2), "kto": 0.5,
        "bco": math.log(2), "apo_zero": 1.0,
    }[loss]  # fmt: skip
    assert value == torch.tensor(expected, dtype=torch.float32).item() or loss in ("ipo", "robust")
    assert value == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("loss", SYMMETRIC)
def test_pitfall_r_swapped_answers_mirror_the_loss(loss: str) -> None:
    """R: the two losses differ by the margin alone, whose sign turns."""
    swapped = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in PAIRS]
    values, rewards = [], []
    for rows in (PAIRS, swapped):
        model, reference = model_and_reference()
        objective = objective_of({loss: 1.0}, reference, PreferenceNumbers(beta=0.3))
        batch = in_order(batches_of(pairs(rows), {loss: 1.0}))
        found = objective.loss(model, collate(batch))
        values.append(found.sum.item())
        rewards.append(float(found.metrics["rewards/margins"][0]))
    assert rewards[0] == pytest.approx(-rewards[1], rel=1e-5)
    if loss != "sigmoid_norm":
        assert values[0] - values[1] == pytest.approx(-rewards[0], rel=1e-4)
    assert values[0] != values[1]


def test_pitfall_r_no_answer_is_ever_cut() -> None:
    """R: a pair with an answer that does not fit is left out and named, not learned by half."""
    reader = PreferenceData(tokenizer_of("own"), 12)
    rows = [*PAIRS, {"prompt": "the", "chosen": " river", "rejected": " hills " * 12}]
    kept = list(reader.read(Document(None, row, f"rows:{n}") for n, row in enumerate(rows)))
    end = tokenizer_of("own").end_of_reply_id
    assert 0 < len(kept) < len(rows)
    assert all(answer.tokens[-1] == end for one in kept for answer in one.completions)
    assert any("rows:5" in name for name in reader.tally.named)


@pytest.mark.parametrize("loss", ["ipo", "sigmoid_norm", "simpo"])
def test_pitfall_r_means_do_not_grow_with_length(loss: str) -> None:
    """R: losses of per-token means do not change where every token is said twice as often."""
    values = []
    for times in (1, 2):
        sums = torch.tensor([-4.0, -6.0]) * times
        tokens = torch.tensor([3.0, 5.0]) * times
        half = Pairs(sums, sums.flip(0), sums * 0.9, sums.flip(0) * 1.2, tokens, tokens.flip(0))
        values.append(PAIR_LOSSES[loss](half, PreferenceNumbers()))
    torch.testing.assert_close(values[0], values[1])


def test_pitfall_s_a_vote_of_nine_in_ten_stays_one() -> None:
    """S: a label of 0.9 is nine tenths of liked and one of disliked, not 0 and not 1."""
    model, reference = model_and_reference()
    for loss in sorted(UNPAIRED - {"bco"}):
        values = {}
        for label in (0.0, 0.9, 1.0):
            rows = [{"prompt": one["prompt"], "completion": one["chosen"], "label": label} for one in PAIRS]
            objective = objective_of({loss: 1.0}, reference, PreferenceNumbers(beta=0.3))
            batch = in_order(batches_of(pairs(rows), {loss: 1.0}))
            values[label] = objective.loss(model, collate(batch)).sum.item()
        assert values[0.9] == pytest.approx(0.9 * values[1.0] + 0.1 * values[0.0], rel=1e-5)
        assert values[0.9] != pytest.approx(values[0.0], rel=1e-3)


def test_pitfall_s_a_row_of_which_nothing_is_left_is_reported() -> None:
    """S: an answer without a token is counted and named; it does not silently teach nothing."""
    reader = PreferenceData(tokenizer_of("own"), 8)
    rows = [{"prompt": "the river rises in the hills and the river", "completion": " rises", "label": 0.9}]
    assert list(reader.read([Document(None, rows[0], "rows:1")])) == []
    assert (reader.tally.dropped, reader.tally.tokens_kept) == (1, 0)
    assert "rows:1 has" in reader.tally.named[0]


@pytest.mark.parametrize("loss", ["sigmoid", "simpo", "kto"])
def test_pitfall_v_logged_rewards_are_what_their_names_say(loss: str) -> None:
    """V: margins are chosen less rejected; rewards are beta times the log-ratio (or mean) they come from."""
    model, reference = model_and_reference()
    numbers = PreferenceNumbers(beta=0.3)
    objective = objective_of({loss: 1.0}, reference, numbers)
    found = objective.loss(model, collate(in_order(batches_of(pairs(), {loss: 1.0}))))
    logged = {name: float(total) / float(weight) for name, (total, weight) in found.metrics.items()}
    judged = pairs() if loss != "kto" else unpaired(pairs())
    rewards: dict[str, list[float]] = {"chosen": [], "rejected": []}
    for one in judged:
        sums = [
            answers_under(which, collate([row_of([one], share=False)])).sums.tolist()
            for which in (model, reference)
        ]
        names = ("chosen", "rejected") if loss != "kto" else ("chosen" if one.label else "rejected",)
        for place, name in enumerate(names):
            ratio = sums[0][place] - (0 if loss == "simpo" else sums[1][place])
            count = int(one.completions[place].learned.sum()) if loss == "simpo" else 1
            rewards[name].append(0.3 * ratio / count)
    for name, values in rewards.items():
        assert logged[f"rewards/{name}"] == pytest.approx(np.mean(values), abs=1e-4)
    if loss != "kto":
        assert logged["rewards/margins"] == pytest.approx(
            logged["rewards/chosen"] - logged["rewards/rejected"], abs=1e-6
        )
        right = np.mean(np.array(rewards["chosen"]) > np.array(rewards["rejected"]))
        assert logged["rewards/accuracies"] == pytest.approx(right)
