"""Distance, angle, CKA and task vectors against their formulas, spelled out by hand."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lab import two_models
from test_tokens import kind, own
from tuning import save, small_model

from trivium.cli import main
from trivium.kit.errors import TriviumError
from trivium.lab.behaviour import Passage
from trivium.lab.closeness_table import VERSION, closeness, drawn, probe_set, tree
from trivium.lab.function_distance import Probed, aligned, borders, measures, pairwise, shifts
from trivium.lab.gather import find
from trivium.lab.weight_distance import cka, cosines, linear_cka


def drawn_models(count: int, contexts: int = 5, vocabulary: int = 7) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.log_softmax(torch.randn(contexts, vocabulary).double(), -1) for _ in range(count)]


def test_the_inner_product_is_that_of_the_centred_shifts():
    """Sum over tokens and contexts, one by one, as the definition reads."""
    first, second, base = drawn_models(3)
    found = pairwise([first, second], base)
    total = np.zeros((2, 2))
    for c in range(5):
        p0 = base[c].exp().numpy()
        deltas = []
        for one in (first, second):
            ratio = (one[c] - base[c]).numpy()
            deltas.append(ratio - (p0 * ratio).sum())
        total += [[sum(p0 * a * b) for b in deltas] for a in deltas]
    assert found["inner"].numpy() == pytest.approx(total)
    kl = sum(float((first[c].exp() * (first[c] - second[c])).sum()) for c in range(5))
    assert float(found["kl"][0, 1]) == pytest.approx(kl)
    middle = ((first.exp() + second.exp()) / 2).log()
    js = sum(float((one.exp() * (one - middle)).sum()) for one in (first, second)) / 2
    assert float(found["js"][0, 1]) == pytest.approx(js)
    assert float(found["js"][0, 1]) <= 5 * np.log(2)


def test_a_small_shift_is_worth_twice_its_divergence():
    """Half of the square of a shift is KL(base || model) to second order."""
    [base] = drawn_models(1)
    torch.manual_seed(1)
    near = torch.log_softmax(base + 0.01 * torch.randn_like(base), -1)
    moved, p = shifts([near], base)
    square = float((p * moved[0] ** 2).sum())
    kl = float((p * (base - near)).sum())
    assert square / 2 == pytest.approx(kl, rel=0.02)


def test_what_a_softmax_does_not_see_is_not_seen():
    first, second, base = drawn_models(3)
    moved, p = shifts([first, second], base)
    assert (p * moved).sum(-1).abs().max() < 1e-12
    same = pairwise([first, first], base)["inner"]
    assert same[0, 1] == pytest.approx(float(same[0, 0]))


def test_domains_count_alike_and_errors_are_the_jackknifes():
    inner = np.zeros((3, 2, 2))
    inner[:, 0, 0], inner[:, 1, 1], inner[:, 0, 1], inner[:, 1, 0] = 8, 8, [4, 8, 0], [4, 8, 0]
    found = Probed(
        ["a", "a", "b"], np.array([1, 1, 10]), dict.fromkeys(("inner", "kl", "js"), inner), "token"
    )
    assert found.weights() == pytest.approx([0.25, 0.25, 0.5])
    mean = found.mean("inner")
    assert mean[0, 1] == pytest.approx(0.25 * 4 + 0.25 * 8)
    table = measures(found)
    own, other = mean[0, 0], mean[1, 1]
    assert table["distance"][0][1] == pytest.approx(np.sqrt(own + other - 2 * mean[0, 1]), rel=1e-5)
    assert table["angle"][0][1] == pytest.approx(mean[0, 1] / np.sqrt(own * other), rel=1e-5)
    # Left out in turn, the first two probes of `a` leave 4 or 8 in its half.
    parts = [0.5 * 8, 0.5 * 4]
    expected = np.sqrt(0.5 * sum((one - mean[0, 1]) ** 2 for one in parts))
    assert table["standard_error"]["inner"][0][1] == pytest.approx(expected, rel=1e-5)


def test_cka_is_one_under_rotation_and_scale_and_small_for_strangers():
    torch.manual_seed(0)
    x = torch.randn(200, 8)
    turn, _ = torch.linalg.qr(torch.randn(8, 8))
    assert linear_cka(x, 3 * x @ turn + 5) == pytest.approx(1.0)
    y = torch.randn(200, 8)
    assert linear_cka(x, y) < 0.2
    x, y = x.double(), y.double()
    xc, yc = x - x.mean(0), y - y.mean(0)
    by_hand = (yc.T @ xc).pow(2).sum() / ((xc.T @ xc).pow(2).sum() * (yc.T @ yc).pow(2).sum()).sqrt()
    assert linear_cka(x, y) == pytest.approx(float(by_hand))


def test_models_of_other_windows_are_compared_over_what_both_read():
    tokenizer = own()
    members = [
        SimpleNamespace(tokenizer=tokenizer, model=small_model(tokenizer, context=context))
        for context in (24, 64)
    ]
    text = Passage("p", "prose", "", "the river and the miller " * 8)
    assert len(tokenizer.encode(text.text)) > 24
    assert np.array(cka(members, [text])) == pytest.approx(1.0, abs=1e-5)


def test_task_vectors_are_compared_plainly_and_by_weight():
    a, b = {"w": torch.tensor([1.0, 0.0])}, {"w": torch.tensor([1.0, 1.0])}
    assert cosines([a, b])[0][1] == pytest.approx(1 / np.sqrt(2), abs=1e-6)
    assert cosines([a, b], {"w": torch.tensor([1.0, 0.0])})[0][1] == pytest.approx(1.0)
    assert cosines([a, {"w": torch.zeros(2)}])[0][1] is None


def test_the_tree_joins_the_nearest_first():
    found = tree(["a", "b", "c"], [[0, 1, 4], [1, 0, 6], [4, 6, 0]])
    assert found == [5.0, "c", [1.0, "a", "b"]]
    assert drawn(found) == ["5", "├ c", "└ 1", "  ├ a", "  └ b"]


def test_three_models_give_the_matrices_of_the_contract(tmp_path: Path, capsys):
    models = two_models(tmp_path)
    tokenizer = own()
    save(tmp_path / "third", small_model(tokenizer, seed=2), tokenizer)
    models.append(str(tmp_path / "third"))
    main(["distance", *models, "--runs", str(tmp_path), "--probes", "general-1", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["models"] == ["first", "second", "third"]
    assert found["base"] == "first"
    assert {"distance", "angle", "kl", "js", "standard_error", "cka", "task_vector", "tree"} <= found.keys()
    table = np.array(found["distance"], dtype=float)
    assert table == pytest.approx(table.T)
    assert np.diag(table) == pytest.approx(np.zeros(3))
    # The base has moved nowhere, so nothing lies at an angle to it.
    assert found["angle"][0] == [None, None, None]
    assert found["kl"][1][2] > 0
    assert found["kl"][1][2] != found["kl"][2][1]
    assert found["standard_error"]["kl"][1][2] > 0
    assert found["probes"].startswith(VERSION)
    main(["distance", *models[1:], "--runs", str(tmp_path), "--probes", "general-1", "--suggest", models[0]])
    assert "KL(goal || it)" in capsys.readouterr().out


def test_a_probe_set_keeps_its_version():
    """Another text is another version: numbers are compared by this name."""
    described, texts = probe_set("general-1", [], 1, 0)
    assert len(texts) == 36
    assert {one.kind for one in texts} == {"prose", "facts", "sums", "code", "instructions", "languages"}
    assert described == "general-1, 9ca7a1b87e69e711"
    with pytest.raises(TriviumError, match="no probe set; there are general-1"):
        probe_set("general-0", [], 1, 0)


def test_the_token_that_begins_a_text_has_a_place_in_the_window():
    text = "the river and the miller " * 4
    for tokenizer, fitting in ((kind("llama3"), 7), (own(), 8)):
        ids, ends = borders(SimpleNamespace(tokenizer=tokenizer), text, 8)
        assert len(ids) == fitting
        assert text.encode()[: ends[-1]].decode() == tokenizer.decode(ids)


def test_on_bytes_a_model_says_the_same_as_on_tokens(tmp_path: Path):
    """The probability of a byte is the sum over the tokens that begin with it."""
    models = [find(one, tmp_path) for one in two_models(tmp_path)]
    [first, _] = aligned(models, Passage("p", "prose", "", "the river and the miller"), 64)
    assert first.exp().sum(-1) == pytest.approx(torch.ones(len(first)).double(), abs=1e-6)
    found = closeness([str(tmp_path / "first"), str(tmp_path / "second")], runs=tmp_path, probes="general-1",
                      weights=False)  # fmt: skip
    assert found["unit"] == "token"
