"""Each preference loss against a few lines of numpy from its paper, and the identities it must keep."""

import numpy as np
import pytest
import torch

from trivium.learn.objectives.preference_losses import (
    PAIR_LOSSES,
    WITHOUT_REFERENCE,
    Pairs,
    PreferenceNumbers,
    apo_zero_unpaired,
    bco,
    kto,
)

NUMBERS = PreferenceNumbers(beta=0.3, label_smoothing=0.1, gamma=0.7, temperature=0.05, delta=0.2)


def drawn(seed: int = 0, count: int = 7) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    names = ("chosen", "rejected", "reference_chosen", "reference_rejected")
    values = {name: -random.uniform(1, 30, count) for name in names}
    values["chosen_tokens"], values["rejected_tokens"] = random.integers(2, 20, (2, count)).astype(float)
    return values


def pairs_of(values: dict[str, np.ndarray]) -> Pairs:
    return Pairs(**{name: torch.tensor(value) for name, value in values.items()})


def s(x):
    return 1 / (1 + np.exp(-x))


def reference(name: str, v: dict[str, np.ndarray]) -> np.ndarray:
    """The losses once more, in numpy."""
    beta, smooth = NUMBERS.beta, NUMBERS.label_smoothing
    w, l = v["chosen"] - v["reference_chosen"], v["rejected"] - v["reference_rejected"]  # noqa: E741
    margin = w - l
    mean_margin = w / v["chosen_tokens"] - l / v["rejected_tokens"]
    mean_w, mean_l = v["chosen"] / v["chosen_tokens"], v["rejected"] / v["rejected_tokens"]

    def soft(x):
        return -(1 - smooth) * np.log(s(x)) - smooth * np.log(s(-x))

    def odds(x):
        return np.exp(x) / (1 - np.exp(x))

    sorted_margin = np.sort(v["chosen"] - v["rejected"]) - np.sort(
        v["reference_chosen"] - v["reference_rejected"]
    )
    p = s(beta * margin)
    share = s(beta * margin / NUMBERS.temperature)
    return {
        "sigmoid": lambda: soft(beta * margin),
        "sigmoid_norm": lambda: soft(beta * mean_margin),
        "hinge": lambda: np.maximum(0, 1 - beta * margin),
        "ipo": lambda: (mean_margin - 1 / (2 * beta)) ** 2,
        "robust": lambda: (
            (-(1 - smooth) * np.log(s(beta * margin)) + smooth * np.log(s(-beta * margin))) / (1 - 2 * smooth)
        ),
        "exo_pair": lambda: p * np.log(p / (1 - smooth)) + (1 - p) * np.log((1 - p) / smooth),
        "nca_pair": lambda: -np.log(s(beta * w)) - (np.log(s(-beta * w)) + np.log(s(-beta * l))) / 2,
        "bco_pair": lambda: -np.log(s(beta * w - 0.2)) - np.log(s(-(beta * l - 0.2))),
        "sppo_hard": lambda: (w - 1 / (2 * beta)) ** 2 + (l + 1 / (2 * beta)) ** 2,
        "aot": lambda: soft(beta * sorted_margin),
        "aot_unpaired": lambda: soft(beta * (np.sort(w) - np.sort(l))),
        "apo_zero": lambda: 1 - s(beta * w) + s(beta * l),
        "apo_down": lambda: s(beta * w) + 1 - s(beta * margin),
        "discopop": lambda: -np.log(p) * (1 - share) + np.exp(-beta * margin) * share,
        "simpo": lambda: soft(beta * (mean_w - mean_l) - NUMBERS.gamma),
        "alphapo": lambda: soft(
            beta * ((1 - np.exp(mean_w) ** -0.25) / 0.25 - (1 - np.exp(mean_l) ** -0.25) / 0.25)
            - NUMBERS.gamma
        ),
        "cpo": lambda: soft(beta * (v["chosen"] - v["rejected"])),
        "slic": lambda: np.maximum(0, 1 - beta * (v["chosen"] - v["rejected"])),
        "orpo": lambda: -beta * np.log(s(np.log(odds(mean_w) / odds(mean_l)))),
    }[name]()


@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_every_loss_equals_its_numpy_reference(name: str) -> None:
    """Pitfall R: sums against means, and the scale of beta, are what each paper says."""
    values = drawn()
    ours = PAIR_LOSSES[name](pairs_of(values), NUMBERS)
    np.testing.assert_allclose(ours.numpy(), reference(name, values), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["sigmoid", "sigmoid_norm", "aot", "aot_unpaired"])
def test_at_the_start_the_loss_is_log_two(name: str) -> None:
    values = drawn()
    values["reference_chosen"], values["reference_rejected"] = values["chosen"], values["rejected"]
    ours = PAIR_LOSSES[name](pairs_of(values), PreferenceNumbers(beta=0.1))
    np.testing.assert_allclose(ours.numpy(), np.log(2), rtol=0, atol=1e-12)


def test_swapping_the_answers_mirrors_dpo() -> None:
    """-log s(x) - (-log s(-x)) = -x, so the two losses differ by exactly the margin."""
    values = drawn()
    swapped = {
        "chosen": values["rejected"],
        "rejected": values["chosen"],
        "reference_chosen": values["reference_rejected"],
        "reference_rejected": values["reference_chosen"],
        "chosen_tokens": values["rejected_tokens"],
        "rejected_tokens": values["chosen_tokens"],
    }
    numbers = PreferenceNumbers(beta=0.3)
    there = PAIR_LOSSES["sigmoid"](pairs_of(values), numbers)
    back = PAIR_LOSSES["sigmoid"](pairs_of(swapped), numbers)
    np.testing.assert_allclose((there - back).numpy(), -0.3 * pairs_of(values).margin.numpy(), rtol=1e-9)


@pytest.mark.parametrize("name", sorted(WITHOUT_REFERENCE - {"sft"}))
def test_losses_without_a_reference_do_not_read_it(name: str) -> None:
    values = drawn()
    before = PAIR_LOSSES[name](pairs_of(values), NUMBERS)
    values["reference_chosen"] = values["reference_chosen"] * 7
    after = PAIR_LOSSES[name](pairs_of(values), NUMBERS)
    assert torch.equal(before, after)


def test_robust_dpo_is_unbiased_under_flipped_labels() -> None:
    """The mean over labels flipped at the stated rate is the loss of the clean labels."""
    values, rate = drawn(), 0.2
    numbers = PreferenceNumbers(beta=0.3, label_smoothing=rate)
    pairs = pairs_of(values)
    flipped = Pairs(
        pairs.rejected, pairs.chosen, pairs.reference_rejected, pairs.reference_chosen,
        pairs.rejected_tokens, pairs.chosen_tokens,
    )  # fmt: skip
    noisy = (1 - rate) * PAIR_LOSSES["robust"](pairs, numbers) + rate * PAIR_LOSSES["robust"](
        flipped, numbers
    )
    clean = PAIR_LOSSES["sigmoid"](pairs, PreferenceNumbers(beta=0.3))
    torch.testing.assert_close(noisy, clean)


def test_unpaired_losses_equal_their_numpy_references() -> None:
    random = np.random.default_rng(1)
    ratios, desirable = random.normal(0, 5, 9), random.random(9) < 0.5
    given = torch.tensor(ratios), torch.tensor(desirable)
    kl, beta, weights = 0.4, 0.2, (1.0, 1.3)
    expected = np.where(desirable, 1 - s(beta * (ratios - kl)), 1.3 * (1 - s(beta * (kl - ratios))))
    np.testing.assert_allclose(kto(*given, torch.tensor(kl), beta, weights).numpy(), expected, rtol=1e-9)
    expected = np.where(desirable, 1 - s(beta * ratios), 1.3 * s(beta * ratios))
    np.testing.assert_allclose(apo_zero_unpaired(*given, beta, weights).numpy(), expected, rtol=1e-9)
    expected = np.where(desirable, -np.log(s(beta * ratios - 0.3)), -np.log(s(-(beta * ratios - 0.3))))
    np.testing.assert_allclose(bco(*given, beta, 0.3).numpy(), expected, rtol=1e-9)
