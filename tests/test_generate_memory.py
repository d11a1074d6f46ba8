"""The cache's memory: what is free, who shares it, and that a budget holds at every moment."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import pytest
import torch
from generating import prompt, tiny_engine, tiny_model, tokenizer

from trivium.generate import kv_cache
from trivium.generate.engine import Engine
from trivium.generate.requests import Request
from trivium.generate.sampling import Sampling
from trivium.kit import machine
from trivium.model.folder import save_model
from trivium.serve.models import open_engine

GREEDY = Sampling(temperature=0.0, max_new_tokens=24, stop_ids=())
PER_TOKEN = 3 * 2 * 2 * 16 * 4
MIB = 2**20


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with 100 MiB that can be had, 1 MiB of them in free pages."""
    (tmp_path / "meminfo").write_text(
        "MemTotal:  204800 kB\nMemFree:  1024 kB\nMemAvailable:  102400 kB\nHugePages_Total:  0\n"
    )
    monkeypatch.setattr(machine, "MEMINFO", str(tmp_path / "meminfo"))
    monkeypatch.setattr(machine, "CGROUP", str(tmp_path))
    return tmp_path


def test_pages_that_mirror_files_are_free(system: Path) -> None:
    assert machine.free_memory() == 100 * MIB
    (system / "memory.max").write_text("max\n")
    (system / "memory.current").write_text(f"{60 * MIB}\n")
    assert machine.free_memory() == 100 * MIB


def test_a_container_has_what_its_limit_leaves(system: Path) -> None:
    (system / "memory.max").write_text(f"{64 * MIB}\n")
    (system / "memory.current").write_text(f"{60 * MIB}\n")
    (system / "memory.stat").write_text(f"anon {30 * MIB}\ninactive_file {16 * MIB}\n")
    assert machine.free_memory() == 20 * MIB
    assert tiny_engine().cache.budget == 10 * MIB
    (system / "memory.current").write_text(f"{99 * MIB}\n")
    assert machine.free_memory() == 0


def test_models_served_together_share_what_is_free(system: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    save_model(tiny_model(), folder)
    tokenizer().save(folder)
    budgets = [open_engine(folder, sharing=3, device="cpu").cache.budget for _ in range(3)]
    assert budgets == [50 * MIB // 3] * 3
    # An engine that is no longer used, and not yet collected, takes nothing from the next.
    engines = [tiny_engine() for _ in range(40)]
    assert engines[-1].cache.budget == 50 * MIB


@pytest.mark.parametrize("places", [300, 700, 1100, 2049])
def test_a_budget_holds_while_storage_moves(places: int, monkeypatch: pytest.MonkeyPatch) -> None:
    living: weakref.WeakSet = weakref.WeakSet()
    most = 0
    room = kv_cache.Pool._allocate

    def counted(pool: kv_cache.Pool, rows: int) -> torch.Tensor:
        nonlocal most
        made = room(pool, rows)
        living.add(made)
        most = max(most, sum(one.nbytes for one in living))
        return made

    monkeypatch.setattr(kv_cache.Pool, "_allocate", counted)
    engine = Engine(tiny_model(), tokenizer(), max_rows=16, memory_budget=PER_TOKEN * places)
    lengths = [20, 30, 150, 9, 40, 60, 180, 12, 33, 21, 70, 90, 5, 5, 5, 5]
    requests = [Request(prompt(length, seed=seed), GREEDY) for seed, length in enumerate(lengths)]
    together = engine.generate(requests)
    assert PER_TOKEN * 128 <= most <= engine.cache.budget
    alone = tiny_engine()
    assert together == [alone.generate([request])[0] for request in requests]


@pytest.mark.parametrize(
    ("length", "capacity"), [(513, 1024), (768, 1024), (1025, 1536), (1536, 1536), (1537, 2048)]
)
def test_capacities_double_and_from_a_thousand_on_have_a_half_step(length: int, capacity: int) -> None:
    assert kv_cache.Cache.capacity_for(length) == capacity


def test_attention_reads_in_units_that_are_summed_alike() -> None:
    """Blocks of 16 as long as a row is summed as one, which of many queries is half of 512."""
    assert [kv_cache.reach_for(length) for length in (1, 255, 256, 257, 513)] == [16, 256, 256, 512, 1024]
    alone = [kv_cache.reach_for(length, lone=True) for length in (257, 512, 513)]
    assert alone == [272, 512, 1024]


def test_scores_over_the_vocabulary_are_kept_once_for_all_numbers_of_rows() -> None:
    # Tensors that other tests left behind are held here, so that no new tensor can take their identity.
    before = [one for one in gc.get_objects() if type(one) is torch.Tensor]
    others = {id(one) for one in before}
    engine = tiny_engine(rows=32)
    short = Sampling(temperature=0.0, max_new_tokens=2, stop_ids=())
    for rows in range(32, 0, -1):
        engine.generate([Request(prompt(8, seed), sampling=short) for seed in range(rows)])
    tensors = [one for one in gc.get_objects() if type(one) is torch.Tensor and id(one) not in others]
    wide = [one for one in tensors if one.dim() == 2 and one.shape[1] == engine.vocabulary]
    storages = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in wide}
    # The embedding and the head, the scores of a step, and a few copies of them that sampling holds.
    least = engine.vocabulary * 4
    assert sum(storages.values()) <= 2 * least * engine.model.config.width + 4 * 32 * least
