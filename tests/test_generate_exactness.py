"""The probe says what the kernels here do, and the engine keeps to it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from generating import tiny_model
from hypothesis import given
from hypothesis import strategies as st

from trivium.generate import exactness
from trivium.generate.exactness import (
    BIT_EXACT,
    CLOSE,
    Exactness,
    Heads,
    Product,
    VerifiedSizes,
    probe,
    probed,
)
from trivium.generate.forward import FusedForward, ModuleForward, forward_pass_of
from trivium.model.config import ExpertsConfig

PRODUCTS = (Product(64, 96, "mm"), Product(96, 64, "addmm"))
HEADS = Heads(1, 2, 16, None)


@given(st.sets(st.integers(1, 64), min_size=1), st.integers(1, 600))
def test_rows_are_padded_as_little_as_can_be_and_cut_into_sizes_that_were_tried(sizes, count):
    rows = VerifiedSizes(tuple(sorted(sizes)))
    padded = rows.padded(count)
    assert count <= padded <= count + max(sizes)
    cuts = rows.cuts(padded)
    assert {cut.stop - cut.start for cut in cuts} <= sizes
    assert [cut.start for cut in cuts] == [0, *(cut.stop for cut in cuts[:-1])]
    assert cuts[-1].stop == padded
    assert rows.padded(padded) == padded


def test_in_the_sizes_found_a_row_has_the_same_bits_at_every_place_among_any_others():
    rows = probe(PRODUCTS, HEADS).rows
    generator = torch.Generator().manual_seed(5)
    crowd, weight = torch.randn(64, 64, generator=generator), torch.randn(64, 96, generator=generator)
    asked = torch.randn(1, 64, generator=generator)
    (expected,) = rows.apply(asked, lambda some: torch.mm(some, weight))
    for count in range(1, 65) if rows.sizes else ():
        for place in {0, count // 2, count - 1}:
            beside = torch.cat((crowd[:place], asked, crowd[place : count - 1]))
            assert torch.equal(rows.apply(beside, lambda some: torch.mm(some, weight))[place], expected)


def test_little_padding_for_one_row_comes_before_large_products():
    classes = [(17, 64), (16, 24), (8, 32), (4, 32), (4, 64), (2, 16)]
    assert sorted(classes, key=exactness._worth) == [
        (17, 64), (16, 24), (2, 16), (8, 32), (4, 32), (4, 64),
    ]  # fmt: skip


@pytest.mark.parametrize("wrong_below", [5, 7])
def test_numbers_of_rows_that_are_summed_otherwise_are_left_out(monkeypatch, wrong_below):
    exact = torch.mm

    def otherwise(rows, weight):
        # as libraries do it: few rows, and what is left of whole tiles of six, go through another kernel
        out, rest = exact(rows, weight), len(rows) % 6 if len(rows) >= wrong_below else len(rows)
        return torch.cat((out[: len(out) - rest], out[len(out) - rest :].nextafter(torch.tensor(9.0))))

    monkeypatch.setattr(torch, "mm", otherwise)
    sizes = probe(PRODUCTS[:1], HEADS).rows.sizes
    assert sizes
    assert all(size % 6 == 0 for size in sizes)


def test_where_no_number_of_rows_will_do_the_promise_is_the_weaker_one(monkeypatch):
    exact = torch.mm
    monkeypatch.setattr(
        torch, "mm", lambda *two: exact(*two) * (1 + torch.arange(len(two[0]))[:, None] * 1e-6)
    )
    assert probe((Product(64, 96, "mm"),), HEADS).promise == CLOSE
    assert probe((Product(64, 96, "linear"),), HEADS).promise in (BIT_EXACT, CLOSE)


def test_what_was_found_is_kept_on_disk_and_a_damaged_file_is_not_believed(tmp_path, monkeypatch):
    monkeypatch.setenv("TRIVIUM_CACHE", str(tmp_path))
    exactness._probed.cache_clear()
    first = probed(PRODUCTS, HEADS)
    (file,) = tmp_path.rglob("*.json")
    exactness._probed.cache_clear()
    with monkeypatch.context() as inside:
        inside.setattr(exactness, "probe", lambda *asked: pytest.fail("probed again"))
        assert probed(PRODUCTS, HEADS) == first
        assert probed(PRODUCTS, HEADS) is probed(PRODUCTS, HEADS)
    for damage in (
        "{",
        "[]",
        json.dumps({"found": {"rows": "x"}}),
        json.dumps({**json.loads(file.read_text()), "version": 0}),
    ):
        file.write_text(damage)
        exactness._probed.cache_clear()
        assert probed(PRODUCTS, HEADS) == first
    # other kernels, another answer; whichever these are
    monkeypatch.setenv("MKL_CBWR", "AVX2" if os.environ.get("MKL_CBWR") == "COMPATIBLE" else "COMPATIBLE")
    probed(PRODUCTS, HEADS)
    assert len(list(tmp_path.rglob("*.json"))) == 2


def test_a_folder_that_cannot_be_written_costs_a_probe_and_nothing_else(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TRIVIUM_CACHE", str(tmp_path / "file"))
    exactness._probed.cache_clear()
    assert isinstance(probed(PRODUCTS, HEADS), Exactness)


def test_each_model_is_promised_what_its_passes_can_keep():
    assert FusedForward(tiny_model()).exactness.promise == probed(PRODUCTS, HEADS).promise
    assert ModuleForward(tiny_model().to(torch.bfloat16)).exactness.promise == "none in bfloat16"
    mixed = tiny_model(experts=ExpertsConfig(count=4, per_token=2, inner_width=48))
    assert forward_pass_of(mixed, 8).exactness.promise == CLOSE


CHILD = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from generating import assert_as_promised, prompt, tiny_model, tokenizer
from trivium.generate.engine import Engine
from trivium.generate.requests import Request
from trivium.generate.sampling import Sampling

for changes in ({}, {"key_value_heads": 4, "attention_soft_cap": 3.0, "windows": (40, None, 40)}):
    engine = Engine(tiny_model(**changes), tokenizer(), max_rows=8)
    settings = Sampling(temperature=0.7, seed=1, max_new_tokens=5, stop_ids=(), logprobs=True)
    texts = [prompt(length, seed=length) for length in (250, 1, 17, 90, 300)]
    together = engine.generate([Request(text, settings) for text in texts])
    scores = engine.score([text[:1] for text in texts], [text[1:] for text in texts])
    for text, expected, score in zip(texts, together, scores, strict=True):
        assert_as_promised(engine, engine.generate([Request(text, settings)])[0], expected)
        (alone,) = engine.score([text[:1]], [text[1:]])
        assert_as_promised(engine, [alone.logprobs], [score.logprobs])
print(engine.exactness.promise, engine.exactness.rows, engine.exactness.prompts, engine.exactness.steps)
"""


@pytest.mark.parametrize("setting", ["MKL_CBWR=COMPATIBLE", "MKL_ENABLE_INSTRUCTIONS=AVX2"])
def test_the_promise_holds_with_kernels_that_sum_in_another_order(setting):
    """As on other processors: MKL takes other kernels where it is told to."""
    name, _, value = setting.partition("=")
    child = [sys.executable, "-c", CHILD, str(Path(__file__).parent)]
    done = subprocess.run(child, env={**os.environ, name: value}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
