"""Souping against references written entry by entry from the papers."""

import math

import pytest
import torch
from peft.utils.merge_utils import ties as peft_ties

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


@pytest.mark.parametrize("density", [0.2, 0.4, 0.9])
def test_ties_is_that_of_peft_on_the_whole_task_vector(density: float) -> None:
    """Yadav et al. trim the vector of all weights, so a tensor that learnt little keeps little."""
    base, *tuned = models(4)
    for model in (base, *tuned):
        model["b"] = torch.cat([model["b"], model["a"][0, :4] - model["b"][:4]])
    for model in tuned:
        model["a"] = base["a"] + 5 * (model["a"] - base["a"])
    vectors = [
        torch.cat([(model[key].double() - base[key].double()).flatten() for key in ("a", "b")])
        for model in tuned
    ]
    theirs = peft_ties(vectors, torch.ones(3), density + 1e-9, "total")
    merged = merge.ties(base, tuned, density=density, scale=0.7)
    ours = torch.cat([(merged[key] - base[key]).flatten() for key in ("a", "b")])
    torch.testing.assert_close(ours.double(), 0.7 * theirs, atol=1e-5, rtol=0)


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
