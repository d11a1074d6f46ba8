"""Souping against references written entry by entry from the papers."""

import math

import pytest
import torch

from trivium.kit.errors import TriviumError
from trivium.model import merge


def models(count: int, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        {"a": torch.randn(5, 7, generator=generator), "b": torch.randn(11, generator=generator)}
        for _ in range(count)
    ]


def assert_same(left: dict, right: dict, tolerance: float = 1e-6) -> None:
    assert left.keys() == right.keys()
    for key in left:
        torch.testing.assert_close(left[key], right[key], atol=tolerance, rtol=0)


@pytest.mark.parametrize("method", ["mean", "weighted", "slerp", "ties", "dare", "tasks"])
def test_merging_a_model_with_itself_is_the_identity(method: str) -> None:
    (model,) = models(1)
    (base,) = models(1, seed=9)
    merged = {
        "mean": lambda: merge.mean([model] * 3),
        "weighted": lambda: merge.mean([model] * 2, [0.3, 0.9]),
        "slerp": lambda: merge.slerp(model, model, 0.4),
        "ties": lambda: merge.ties(base, [model] * 3, density=1.0),
        "dare": lambda: merge.dare(base, [model] * 3, density=1.0),
        "tasks": lambda: merge.add_task_vectors(base, merge.task_vectors(base, [model]), [1.0]),
    }[method]()
    assert_same(merged, model)


def test_the_weighted_mean_by_hand() -> None:
    first, second = models(2)
    merged = merge.mean([first, second], [1, 3])
    torch.testing.assert_close(merged["b"], 0.25 * first["b"] + 0.75 * second["b"])


def test_slerp_keeps_the_angle_and_the_length() -> None:
    first, second = models(2)
    first = {key: tensor / tensor.norm() for key, tensor in first.items()}
    second = {key: tensor / tensor.norm() for key, tensor in second.items()}
    third = merge.slerp(first, second, 0.3)
    for key in first:
        whole = math.acos(float((first[key] * second[key]).sum()))
        part = math.acos(float((first[key] * third[key]).sum()))
        assert part == pytest.approx(0.3 * whole, abs=1e-4)
        assert float(third[key].norm()) == pytest.approx(1.0, abs=1e-5)


def test_a_task_that_was_added_can_be_subtracted() -> None:
    base, tuned = models(2)
    vectors = merge.task_vectors(base, [tuned])
    added = merge.add_task_vectors(base, vectors, [0.5])
    assert_same(merge.add_task_vectors(added, vectors, [-0.5]), base)


def test_ties_entry_by_entry() -> None:
    base, *tuned = models(4)
    density, scale = 0.4, 0.7
    expected = {}
    for key in base:
        flat = [(model[key].double() - base[key].double()).flatten().tolist() for model in tuned]
        size = len(flat[0])
        keep = max(1, round(density * size))
        for values in flat:
            allowed = sorted(range(size), key=lambda i: -abs(values[i]))[:keep]
            for i in set(range(size)) - set(allowed):
                values[i] = 0.0
        merged = []
        for i in range(size):
            column = [values[i] for values in flat]
            positive = sum(value for value in column if value > 0)
            negative = -sum(value for value in column if value < 0)
            sign = 1 if positive > negative else -1
            agreeing = [value for value in column if value * sign > 0]
            merged.append(sum(agreeing) / len(agreeing) if agreeing else 0.0)
        moved = torch.tensor(merged, dtype=torch.double).view(base[key].shape)
        expected[key] = (base[key].double() + scale * moved).float()
    assert_same(merge.ties(base, tuned, density=density, scale=scale), expected)


def test_dare_drops_the_asked_share_and_keeps_the_mean() -> None:
    base = {"a": torch.zeros(400, 500)}
    thinned = merge.drop_and_rescale({"a": torch.ones(400, 500).double()}, 0.25, seed=1)["a"]
    assert set(thinned.unique().tolist()) == {0.0, 4.0}
    assert float((thinned == 0).double().mean()) == pytest.approx(0.75, abs=0.01)
    merged = merge.dare(base, [{"a": torch.ones(400, 500)}] * 2, density=0.25, seed=1)
    assert float(merged["a"].mean()) == pytest.approx(1.0, abs=0.02)
    assert set(merged["a"].unique().tolist()) == {0.0, 2.0, 4.0}, "each model needs its own mask"


def test_models_of_another_shape_are_refused_by_name() -> None:
    first, second = models(2)
    second["b"] = second["b"][:-1]
    with pytest.raises(TriviumError, match="'left' and 'right' cannot be merged: 'b'"):
        merge.check_alike([first, second], ["left", "right"])
    del second["b"]
    with pytest.raises(TriviumError, match="only one of them has the tensor 'b'"):
        merge.check_alike([first, second], ["left", "right"])


def test_weights_must_fit_the_models() -> None:
    with pytest.raises(TriviumError, match="3 models need as many weights"):
        merge.mean(models(3), [1, 2])
