"""L1 on every device: bit-identical where kernels add in a fixed order, and named where they do not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from devices import DEVICES
from small import assert_identical, small_model, small_trainer, weights_of
from torch.nn.attention import SDPBackend, _cur_sdpa_kernel_backends

from trivium.kit import machine
from trivium.kit.errors import TriviumError
from trivium.learn.determinism import deterministic_kernels, how_it_resumes
from trivium.learn.objectives.next_token import NextToken

GPU = torch.device("cuda")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float8"])
def test_a_resumed_run_is_bit_identical(tmp_path: Path, precision: str, device: str) -> None:
    """Windows and grouped heads, so that every kernel of attention takes part."""
    design = {"windows": (5, None), "key_value_heads": 1}
    settings = {"precision": precision, "deterministic": True}
    straight = small_trainer(tmp_path / "straight", model=small_model(**design).to(device), **settings)
    summary = straight.run()
    assert summary["resumes"] == "bit-identical"
    cut = small_trainer(tmp_path / "cut", model=small_model(**design).to(device), **settings)
    with deterministic_kernels(True):
        for _ in range(3):
            cut._after_step(cut._one_step(), 0)
    cut._save(wait=True)
    again = small_trainer(tmp_path / "cut", model=small_model(9, **design).to(device), **settings)
    again.run()
    assert_identical(weights_of(straight.model), weights_of(again.model))


def test_a_gpu_says_whether_it_is(tmp_path: Path) -> None:
    before = torch.are_deterministic_algorithms_enabled()
    assert how_it_resumes(torch.device("cpu")) == "bit-identical"
    assert how_it_resumes(GPU) == "within rounding"
    with deterministic_kernels(False):
        assert how_it_resumes(GPU) == "within rounding"
    with deterministic_kernels(True):
        assert how_it_resumes(GPU) == "bit-identical"
        assert set(_cur_sdpa_kernel_backends()) == {SDPBackend.FLASH_ATTENTION, SDPBackend.MATH}
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert how_it_resumes(GPU) == "within rounding", "a warning changes no kernel"
        with pytest.raises(ValueError, match="broken"), deterministic_kernels(True):
            raise ValueError("broken")
        assert torch.is_deterministic_algorithms_warn_only_enabled(), "what was set before is set after"
    finally:
        torch.use_deterministic_algorithms(before)
    assert SDPBackend.EFFICIENT_ATTENTION in _cur_sdpa_kernel_backends()


def test_an_operation_without_such_a_kernel_is_named(tmp_path: Path) -> None:
    class Unordered(NextToken):
        def loss(self, model, batch):
            raise RuntimeError("histc does not have a deterministic implementation, but you set ...\nmore")

    trainer = small_trainer(tmp_path / "set", objective=Unordered(), deterministic=True)
    with pytest.raises(TriviumError, match=r"histc does not have a deterministic .* within rounding"):
        trainer.run()
    with pytest.raises(RuntimeError, match="histc"):
        small_trainer(tmp_path / "unset", objective=Unordered()).run()


def test_a_run_that_goes_on_within_rounding_says_so(tmp_path: Path, monkeypatch, capsys) -> None:
    cut = small_trainer(tmp_path)
    cut._one_step()
    cut._save(wait=True)
    monkeypatch.setattr("trivium.learn.trainer.how_it_resumes", lambda device: "within rounding")
    small_trainer(tmp_path).run()
    assert "within rounding: this GPU's kernels add in any order" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_memory_of_a_gpu_grows_in_segments_unless_a_person_says_otherwise(monkeypatch, name: str) -> None:
    for one in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "CUBLAS_WORKSPACE_CONFIG"):
        monkeypatch.setenv(one, "")
        monkeypatch.delenv(one)
    machine.device()
    assert "PYTORCH_ALLOC_CONF" not in machine.os.environ, "a machine without a GPU is left as it is"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    machine.device()
    assert machine.os.environ["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    monkeypatch.delenv("PYTORCH_ALLOC_CONF")
    monkeypatch.setenv(name, "max_split_size_mb:64")
    machine.device()
    assert machine.os.environ[name] == "max_split_size_mb:64"
    assert machine.os.environ.get("PYTORCH_ALLOC_CONF") in (None, "max_split_size_mb:64")


def test_products_of_a_gpu_add_in_a_fixed_order_from_the_start(monkeypatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert machine.device() == "cuda:0"
    assert machine.os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
