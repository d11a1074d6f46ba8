"""The kit: files whole or not at all, fingerprints, the log, numbers, the machine, progress."""

from __future__ import annotations

import errno
import io
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from trivium.kit import files, machine, processes
from trivium.kit.errors import TriviumError
from trivium.kit.fingerprint import fingerprint
from trivium.kit.metrics import BLOCK, MetricsLog, read_metrics
from trivium.kit.numbers import number, short, with_unit
from trivium.kit.progress import Progress, duration


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    files.write_text(tmp_path / "a.txt", "old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(TriviumError, match=r"disk is full.*a\.txt"):
        files.write_text(tmp_path / "a.txt", "new")
    with pytest.raises(TriviumError, match="disk is full"), files.whole_folder(tmp_path / "folder") as folder:
        (folder / "b.txt").write_text("b")
    with pytest.raises(TriviumError, match="disk is full"):
        files.save_tensors(tmp_path / "t.safetensors", {"x": torch.zeros(2)})
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
    assert (tmp_path / "a.txt").read_text() == "old"


def test_a_folder_appears_whole_and_replaces_another(tmp_path):
    place = tmp_path / "model"
    with files.whole_folder(place) as beside:
        (beside / "one").write_text("1")
        assert not place.exists()
    with pytest.raises(ZeroDivisionError), files.whole_folder(place) as beside:
        (beside / "two").write_text(str(1 / 0))
    assert [path.name for path in place.iterdir()] == ["one"]
    with files.whole_folder(place) as beside:
        (beside / "two").write_text("2")
    assert [path.name for path in place.iterdir()] == ["two"]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_reader_never_sees_half_a_file(tmp_path):
    path = tmp_path / "big.json"
    program = (
        "import sys; from trivium.kit.files import write_json\n"
        "number = 0\n"
        "while True:\n"
        "    number += 1\n"
        "    write_json(sys.argv[1], [number] * 50_000)\n"
    )
    for _ in range(3):
        writer = subprocess.Popen([sys.executable, "-c", program, str(path)])
        while not path.exists():
            time.sleep(0.005)
        for _ in range(40):
            content = files.read_json(path)
            assert len(content) == 50_000
            assert len(set(content)) == 1
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        assert len(set(files.read_json(path))) == 1


def test_damage_is_named(tmp_path):
    path = tmp_path / "t.safetensors"
    files.save_tensors(path, {"x": torch.arange(4).reshape(2, 2).T}, {"step": "3"})
    assert torch.equal(files.load_tensors(path)["x"], torch.tensor([[0, 2], [1, 3]]))
    before = files.checksum(path)
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert files.checksum(path) != before
    path.write_bytes(content[:-3])
    with pytest.raises(TriviumError, match=r"t\.safetensors is damaged"):
        files.load_tensors(path)
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(TriviumError, match=r"a\.json is not valid JSON"):
        files.read_json(tmp_path / "a.json")
    with pytest.raises(TriviumError, match=r"b\.json is missing"):
        files.read_json(tmp_path / "b.json")


def test_fingerprints_are_of_values_and_stay():
    assert fingerprint({"a": 1, "b": [1.5, None]}) == fingerprint({"b": (1.5, None), "a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": 2})
    assert fingerprint({1, 2}) == fingerprint([1, 2])
    # This very text names folders in people's stores.
    assert fingerprint({"a": 1}) == "1f8c00645b7df6ce"
    with pytest.raises(ValueError):
        fingerprint(float("nan"))


def test_a_log_is_read_from_its_end_alone(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    for step in range(1, 4):
        log.write({"step": step, "text": str(step) * 2 * BLOCK})
    whole = path.read_bytes()
    path.write_bytes(b"#" + whole[1:] + b'{"cut')
    # What is damaged at the start would be found by whatever reads it
    MetricsLog(path).rewind(3)
    assert path.read_bytes() == b"#" + whole[1:]
    path.write_bytes(whole)
    MetricsLog(path).rewind(2)
    assert path.read_bytes() == whole[: whole.rindex(b"\n", 0, -1) + 1]
    for content in (b"", b"no line", b"\n"):
        path.write_bytes(content)
        assert path.read_bytes() == content
        MetricsLog(path)
        assert path.read_bytes() == content[: content.rfind(b"\n") + 1]


def test_the_log_drops_a_cut_off_row_and_rewinds(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    log.write({"change": "rate"})
    for step in (1, 2, 3):
        log.write({"step": step, "loss": torch.tensor(0.5), "norm": float("nan")})
    with open(path, "a") as file:
        file.write('{"step": 4, "lo')
    assert [row.get("step") for row in read_metrics(path)] == [None, 1, 2, 3]
    again = MetricsLog(path)
    again.rewind(2)
    again.write({"step": 3, "loss": 0.25})
    assert read_metrics(path)[2:] == [
        {"step": 2, "loss": 0.5, "norm": None},
        {"step": 3, "loss": 0.25},
    ]
    path.write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    with pytest.raises(TriviumError, match=r"metrics\.jsonl:2"):
        read_metrics(path)


@pytest.mark.parametrize(
    ("written", "meant"),
    [("16k", 16_000), ("20M", 20_000_000), ("1.5B", 1_500_000_000), ("16k tokens", 16_000), ("4_096", 4096),
     ("3e-4", 3e-4), (".5", 0.5), ("2 M", 2_000_000), ("k", "k"), ("1x", "1x"), (7, 7)],
)  # fmt: skip
def test_numbers(written, meant):
    assert number(written) == meant
    assert type(number(written)) is type(meant)


def test_short_numbers_and_durations():
    assert [short(value) for value in (950, 16_384, 2e7, 1.5e9)] == ["950", "16.4k", "20M", "1.5B"]
    assert [duration(value) for value in (4.2, 42, 200, 7500, 1e6, 1.5e9)] == [
        "4.2 s",
        "42 s",
        "3 min 20 s",
        "2 h 05 min",
        "11.6 days",
        "48 years",
    ]


def test_the_world_is_what_torchrun_says(monkeypatch):
    assert processes.world() == processes.World(0, 1, 0)
    for name, value in {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    assert processes.world() == processes.World(3, 8, 1)
    assert not processes.world().leads


def test_alone_nothing_is_exchanged():
    assert processes.all_reduce_sum(2.5) == 2.5
    assert processes.broadcast("x") == "x"
    processes.start()
    processes.barrier()
    processes.stop()
    assert not torch.distributed.is_initialized()


def test_progress_is_plain_lines_when_piped(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    stream = io.StringIO()
    with Progress("base", stream) as progress:
        for done in range(0, 101, 10):
            clock[0] += 1.0
            progress.update(done, 100, loss=2.34567)
        progress.say("a line")
    lines = stream.getvalue().splitlines()
    assert lines[-1] == "a line"
    assert lines[0].startswith("base   40%  40/100 tokens  10 tokens/s  loss 2.346  6.0 s left")
    assert lines[-2].startswith("base  100%  100/100 tokens")
    assert len(lines) == 4


def test_progress_on_a_terminal_is_a_bar_of_twenty_places(monkeypatch):
    clock, shown = [0.0], []
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: True)
    progress = Progress("base", stream)
    monkeypatch.setattr(progress, "_show", shown.append)
    for clock[0], done in ((0.0, 0), (10.0, 25), (20.0, 50), (30.0, 30), (40.0, 60), (45.0, 120)):
        progress.update(done, 100)
    bars = [line.split("  ")[1] for line in shown]
    assert bars == ["━" * filled + "╌" * (20 - filled) for filled in (0, 5, 10, 6, 12, 20)]
    assert [line.split("  ", 2)[2].strip() for line in shown] == [
        "0%  0/100 tokens",
        "25%  25/100 tokens  2.5 tokens/s  30 s left",
        "50%  50/100 tokens  2.5 tokens/s  20 s left",
        # Where it begins again, so does the measurement of its speed.
        "30%  30/100 tokens",
        "60%  60/100 tokens  3 tokens/s  13 s left",
        "100%  120/100 tokens  6 tokens/s",
    ]
    progress.update(7, None, "documents")
    assert shown[-1] == "base  7 documents"


def test_peaks_are_the_work_over_the_best_time(monkeypatch):
    """A product of two square matrices is 2 n^3 operations; a copy reads and writes four bytes a number."""
    timed = []

    def quarter_of_a_second(work, device, seconds):
        timed.append(work())
        return 0.25

    monkeypatch.setattr(machine, "device", lambda: "cpu")
    monkeypatch.setattr(machine, "_best_time", quarter_of_a_second)
    peak, bandwidth = machine.matmul_peak(), machine.memory_bandwidth()
    product, copied = timed
    assert peak == 4 * 2 * len(product) ** 3
    assert product.shape == (len(product), len(product))
    assert bandwidth == 4 * 2 * 4 * copied.numel()


def test_the_machine_describes_itself():
    here = machine.describe()
    assert here.cores >= 1
    assert here.memory > 2**28
    assert here.dtype in ("float32", "bfloat16")
    assert machine.compute_dtype("cpu") is torch.float32
    assert machine.matmul_peak(0.01) > 1e8
    assert machine.memory_bandwidth(0.01) > 1e7


@pytest.mark.parametrize(
    ("value", "written"),
    [(1.2e11, "120 GFLOP/s"), (3.4e12, "3.4 TFLOP/s"), (5e6, "5 MFLOP/s"), (7, "7 FLOP/s")],
)
def test_a_measured_number_has_its_unit_with_a_prefix(value, written):
    assert with_unit(value, "FLOP/s") == written
