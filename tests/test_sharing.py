"""A shared store: pushed once, pulled whole, made by one machine alone, never overwritten."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import s3fs
from buckets import assert_is_a_place, assert_one_creates, made, new_bucket, object_store, until
from forked import forked
from toys import write_recipe

from trivium.cli import main
from trivium.kit.errors import DamagedError, TriviumError
from trivium.kit.places import Folder, place_at
from trivium.pipeline import parts
from trivium.pipeline.lease import Lease, LeaseLost
from trivium.pipeline.run import prepare, run
from trivium.pipeline.sharing import SharedStore
from trivium.pipeline.transfer import pull, push

TESTS = Path(__file__).parent
SCRIPT = "import sys, toys; from trivium.cli import main; main(sys.argv[1:])"


@pytest.fixture(scope="module")
def server() -> Iterator[dict[str, str]]:
    with object_store() as environment:
        yield environment


@pytest.fixture
def bucket(server: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> str:
    return new_bucket(server, monkeypatch)


@pytest.fixture(params=["file", "s3"])
def url(
    request: pytest.FixtureRequest, tmp_path: Path, server: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> str:
    if request.param == "file":
        return f"file://{tmp_path / 'shared'}"
    return new_bucket(server, monkeypatch)


def machine(*words: str | Path, **environment: str) -> subprocess.Popen[str]:
    """Another machine: a process of its own, with folders that only it uses."""
    everything = {**os.environ, "PYTHONPATH": str(TESTS), **environment}
    return forked(*words, env=everything, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def ended(process: subprocess.Popen[str]) -> str:
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said
    return said


def became(rows: list[list[str]]) -> dict[str, str]:
    return {row[0]: row[1] for row in rows[1:]}


def test_a_place_creates_a_name_once_and_lists_what_is_whole(url):
    assert_is_a_place(url)


def test_a_store_that_overwrites_what_it_is_to_create_is_refused(bucket, monkeypatch):
    """So did s3fs before 2024.12, and so do servers that do not know the condition."""
    pipe = s3fs.S3FileSystem._pipe_file

    async def overwriting(self, path, data, mode="overwrite", **more):
        return await pipe(self, path, data, **more)

    monkeypatch.setattr(s3fs.S3FileSystem, "_pipe_file", overwriting)
    with pytest.raises(TriviumError, match=r"s3://.* overwrites what it was asked to create only once"):
        Lease(place_at(bucket), "x").take()


@pytest.mark.quick_cases(1)
def test_of_many_that_create_one_name_one_succeeds(url):
    assert_one_creates(url)


@pytest.mark.quick_cases(1)
def test_what_one_machine_pushes_another_pulls_and_nothing_moves_twice(tmp_path, url):
    path, here, there = write_recipe(tmp_path), tmp_path / "here", tmp_path / "there"
    run(path, here)
    assert set(became(push(path, url, here)).values()) == {"pushed"}
    again = push(path, url, here)
    assert set(became(again).values()) == {"there before"}
    assert became(pull(path, url, there)) == dict.fromkeys(["words", "base", "left", "right"], "pulled")
    assert made(there, "toy") == made(here, "toy")
    assert set(became(pull(path, url, there)).values()) == {"here before"}
    assert set(run(path, there).became.values()) == {"reused"}
    for one in (here, there):
        assert not list((one / "store").glob(".*.pull"))
    with pytest.raises(TriviumError, match=r"holds no result of toy as it reads now"):
        pull(path, url, tmp_path / "third", ["words.vocabulary=9", "base.steps=9"])
    with pytest.raises(TriviumError, match=r"Nothing of toy is finished"):
        push(path, url, tmp_path / "third")


@pytest.mark.slow
def test_a_push_that_was_cut_off_shows_nothing_and_goes_on(tmp_path, bucket, monkeypatch):
    path, here, there = write_recipe(tmp_path), tmp_path / "here", tmp_path / "there"
    prepared = run(path, here, only=["base"])
    fingerprint, entry = prepared.nodes["base"].fingerprint, prepared.entry("base")
    shared = SharedStore(bucket)
    write, sent = shared.place.write, []

    def cut_off(name: str, content: bytes) -> None:
        if len(sent) == 2:
            raise ConnectionResetError("the machine lost its power")
        sent.append(name)
        write(name, content)

    monkeypatch.setattr(shared.place, "write", cut_off)
    monkeypatch.setattr(parts, "THREADS", 1)
    with pytest.raises(ConnectionResetError):
        shared.push(entry, fingerprint)
    assert SharedStore(bucket).manifest(fingerprint) is None
    with pytest.raises(TriviumError, match="holds no result of toy"):
        pull(path, bucket, there, only=["base"])
    moved = SharedStore(bucket).push(entry, fingerprint)
    everything = sum((entry.folder / name).stat().st_size for name in read_names(entry.folder))
    already = sum(shared.place.size(name) or 0 for name in sent)
    assert moved.became == "pushed"
    assert moved.bytes == everything - already
    assert became(pull(path, bucket, there, only=["base"]))["base"] == "pulled"


def test_what_is_half_written_is_no_object(tmp_path):
    place = Folder(tmp_path)
    place.write("x/a", b"1")
    (tmp_path / "x" / ".b.1234.part").write_bytes(b"2")
    assert place.names("x") == ["a"]


def test_what_must_not_be_published_is_not_and_half_a_part_is_sent_again(tmp_path):
    path, shared = write_recipe(tmp_path), SharedStore(tmp_path / "shared")
    prepared = run(path, tmp_path / "here", only=["words"])
    fingerprint, entry = prepared.nodes["words"].fingerprint, prepared.entry("words")

    def lost() -> None:
        raise LeaseLost("another machine has it")

    with pytest.raises(LeaseLost):
        shared.push(entry, fingerprint, lost)
    assert shared.manifest(fingerprint) is None
    part = max((tmp_path / "shared" / "parts").glob("*/*"), key=lambda one: one.stat().st_size)
    content = part.read_bytes()
    part.write_bytes(content[:-1])
    assert shared.push(entry, fingerprint).bytes == len(content)
    assert part.read_bytes() == content


def read_names(folder: Path) -> list[str]:
    return list(json.loads((folder / "COMPLETE").read_text())["files"])


@pytest.mark.quick_cases(1)
def test_a_pull_that_was_cut_off_goes_on_and_large_files_move_in_parts(tmp_path, url, monkeypatch):
    path, here, there = write_recipe(tmp_path), tmp_path / "here", tmp_path / "there"
    monkeypatch.setattr(parts, "PART_BYTES", 100)
    prepared = run(path, here, only=["base"])
    fingerprint = prepared.nodes["base"].fingerprint
    push(path, url, here, only=["base"])
    shared, far = SharedStore(url), prepare(path, there)
    assert max(map(len, shared.manifest(fingerprint)["parts"].values())) > 4
    read, asked = shared.place.read, []

    def cut_off(name: str) -> bytes | None:
        asked.append(name)
        if len(asked) == 8:
            raise ConnectionResetError("the machine lost its power")
        return read(name)

    monkeypatch.setattr(shared.place, "read", cut_off)
    with pytest.raises(ConnectionResetError):
        shared.pull(far.store, fingerprint)
    assert far.entry("base").state == "absent"
    (beside,) = (there / "store").glob(".*.pull")
    kept = {file.name for file in beside.rglob("*") if file.is_file()}
    assert kept
    moved = SharedStore(url).pull(far.store, fingerprint)
    assert far.entry("base").state == "done"
    whole = sum(
        (far.entry("base").folder / name).stat().st_size for name in read_names(far.entry("base").folder)
    )
    assert 0 < moved.bytes < whole
    assert (
        made(here, "toy")["base"] == json.loads((far.entry("base").folder / "COMPLETE").read_text())["result"]
    )


@pytest.mark.quick_cases(1)
def test_a_damaged_result_is_named_never_used_and_repaired(tmp_path, url):
    path, here, there = write_recipe(tmp_path), tmp_path / "here", tmp_path / "there"
    prepared = run(path, here, only=["base"])
    push(path, url, here, only=["base"])
    place, fingerprint = place_at(url), prepared.nodes["base"].fingerprint
    digest, *_ = SharedStore(url).manifest(fingerprint)["parts"]["model/model.json"]
    name = f"parts/{digest[:2]}/{digest}"
    content = place.read(name)
    place.write(name, content.replace(b"0.1", b"0.2"))
    with pytest.raises(DamagedError, match=rf"{name} of base-{fingerprint} is damaged; remove it there"):
        pull(path, url, there, only=["base"])
    assert prepare(path, there).entry("base").state == "absent"
    place.remove(name)
    with pytest.raises(DamagedError, match=rf"{name} of base-{fingerprint} is missing"):
        pull(path, url, there, only=["base"])
    assert became(push(path, url, here, only=["base"]))["base"] == "repaired"
    assert became(pull(path, url, there, only=["base"]))["base"] == "pulled"
    complete = f"results/{fingerprint}/COMPLETE"
    place.write(complete, place.read(complete).replace(b"model.json", b"nodel.json"))
    with pytest.raises(DamagedError, match=rf"{complete} is damaged"):
        pull(path, url, tmp_path / "third", only=["base"])


def test_a_manifest_that_leads_out_of_its_folder_is_refused(tmp_path):
    from trivium.kit.fingerprint import seal_of

    place = Folder(tmp_path / "shared")
    for entry, file in (("../out", "a"), ("base-12", "../../../out"), ("base-12", "/etc/out")):
        content = {"entry": entry, "fingerprint": "12", "parts": {file: []}}
        content["seal"] = {"files": {file: ""}, "sizes": {file: 0}}
        content["sealed"] = seal_of(content)
        place.write("results/12/COMPLETE", json.dumps(content).encode())
        with pytest.raises(DamagedError, match="which is no file in its folder"):
            SharedStore(place).pull(prepare(write_recipe(tmp_path), tmp_path / "runs").store, "12")
    assert not list(tmp_path.rglob("out"))


@pytest.mark.slow
def test_a_manifest_of_another_result_is_refused(tmp_path, url):
    """Somebody copied a folder there by hand: the wrong result would be used without a word."""
    path = write_recipe(tmp_path)
    prepared = run(path, tmp_path / "here")
    push(path, url, tmp_path / "here")
    place, nodes = place_at(url), prepared.nodes
    other = place.read(f"results/{nodes['right'].fingerprint}/COMPLETE")
    place.write(f"results/{nodes['left'].fingerprint}/COMPLETE", other)
    with pytest.raises(DamagedError, match=rf"{nodes['left'].fingerprint}/COMPLETE tells of another result"):
        pull(path, url, tmp_path / "there")


@pytest.mark.slow
def test_two_machines_never_make_the_same_stage(tmp_path, bucket):
    """Both start at once with separate disks; every stage is made by one of them, and both end alike."""
    alone = tmp_path / "alone"
    path = write_recipe(tmp_path)
    run(path, alone)
    both = [machine("run", path, "--runs", tmp_path / name, "--store", bucket) for name in ("here", "there")]
    said = [ended(one) for one in both]
    for stage in ("words", "base", "left", "right"):
        assert sum(f"{stage}: toy_" in one for one in said) == 1, said
    assert made(tmp_path / "here", "toy") == made(tmp_path / "there", "toy") == made(alone, "toy")
    assert not any(name.startswith("LEASE") for name in lease_names(bucket, path, tmp_path))


def lease_names(url: str, path: Path, folder: Path, stage: str = "base") -> list[str]:
    fingerprint = prepare(path, folder / "look").nodes[stage].fingerprint
    return place_at(url).names(f"results/{fingerprint}")


@pytest.mark.slow
def test_a_killed_machines_stage_is_taken_over_when_its_lease_is_over(tmp_path, bucket, monkeypatch):
    path, gate = write_recipe(tmp_path), tmp_path / "gate"
    words = ("run", path, "--store", bucket, "--only", "base", "--set", f"base.gate={gate}")
    monkeypatch.setenv("TRIVIUM_LEASE_SECONDS", "2")
    dead = machine(*words, "--runs", tmp_path / "dead")
    until(lambda: "LEASE.1" in lease_names(bucket, path, tmp_path))
    dead.kill()
    dead.communicate()
    # As a process of another machine would see it: nothing tells that the process is gone.
    place = place_at(bucket)
    name = f"results/{prepare(path, tmp_path / 'look').nodes['base'].fingerprint}/LEASE.1"
    place.write(name, json.dumps({**json.loads(place.read(name)), "boot": "another", "host": "far"}).encode())
    gate.touch()
    said = ended(machine(*words, "--runs", tmp_path / "heir"))
    assert " on far (since" in said
    assert "waiting for it" in said
    assert became(pull(path, bucket, tmp_path / "third", only=["base"]))["base"] == "pulled"


@pytest.mark.slow
def test_a_paused_machine_that_wakes_too_late_does_not_overwrite(tmp_path, bucket, monkeypatch):
    path, gate = write_recipe(tmp_path), tmp_path / "gate"
    words = ("run", path, "--store", bucket, "--only", "base", "--set", f"base.gate={gate}")
    monkeypatch.setenv("TRIVIUM_LEASE_SECONDS", "2")
    asleep = machine(*words, "--runs", tmp_path / "asleep")
    until(lambda: "LEASE.1" in lease_names(bucket, path, tmp_path))
    asleep.send_signal(signal.SIGSTOP)
    gate.touch()
    said = ended(machine(*words, "--runs", tmp_path / "heir"))
    assert "base: toy_train" in said
    fingerprint = prepare(path, tmp_path / "look").nodes["base"].fingerprint
    published = place_at(bucket).read(f"results/{fingerprint}/COMPLETE")
    asleep.send_signal(signal.SIGCONT)
    said = ended(asleep)
    assert "was taken over by another machine" in said
    assert "pulled from s3://" in said
    assert place_at(bucket).read(f"results/{fingerprint}/COMPLETE") == published
    folders = [next((tmp_path / name / "store").glob("base-*")) for name in ("heir", "asleep")]
    assert len({(folder / "COMPLETE").read_text() for folder in folders}) == 1


class Watched:
    """A lease seen from many machines at once, whose clocks a test moves."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr("trivium.pipeline.lease.time.monotonic", lambda: self.now)
        monkeypatch.setattr("trivium.pipeline.lease.has_ended", lambda other: False)


def test_a_lease_is_taken_over_only_after_its_heart_stood_still(tmp_path, monkeypatch):
    clock, place = Watched(monkeypatch), Folder(tmp_path)
    first, second, third = (Lease(place, "x", seconds=10) for _ in range(3))
    assert first.take() is None
    assert second.take() is not None
    for _ in range(3):
        clock.now += 9
        first._renew()
        assert second.take() is not None
    clock.now += 9
    assert second.take() is not None
    assert third.take() is not None  # has only now begun to watch
    clock.now += 2
    assert third.take() is not None
    assert second.take() is None
    assert second.number == 2
    with pytest.raises(LeaseLost, match=r"was taken over by process \d+ on .*Run the same command again"):
        first.check()
    first._renew()
    assert first.lost
    second.check()
    first.release(finished=True)
    second.check()
    second.release(finished=False)
    assert third.take() is None
    assert third.number == 3


@pytest.mark.parametrize("written", ["soon", "0", "-1", "nan", "inf", ""])
def test_the_time_of_a_lease_is_a_number_above_zero(tmp_path, monkeypatch, written):
    monkeypatch.setenv("TRIVIUM_LEASE_SECONDS", written)
    with pytest.raises(TriviumError, match=r"TRIVIUM_LEASE_SECONDS=.* is no time; write seconds"):
        Lease(Folder(tmp_path), "x")
    # Of a lease that another program wrote the default holds.
    clock, place = Watched(monkeypatch), Folder(tmp_path)
    place.write("x/LEASE.1", json.dumps({"seconds": written}).encode())
    lease = Lease(place, "x", seconds=10)
    assert lease.take() is not None
    clock.now += 11
    assert lease.take() is None


def test_a_lease_is_good_for_as_long_as_its_holder_says(tmp_path, monkeypatch):
    clock, place = Watched(monkeypatch), Folder(tmp_path)
    Lease(place, "x", seconds=10).take()
    patient, hasty = Lease(place, "x", seconds=60), Lease(place, "x", seconds=1)
    assert None not in (patient.take(), hasty.take())
    clock.now += 9
    assert None not in (patient.take(), hasty.take())
    clock.now += 2
    assert patient.take() is None


def test_a_process_that_is_gone_from_this_machine_is_not_waited_for(tmp_path):
    code = (
        "import sys; from pathlib import Path; from trivium.kit.places import Folder;"
        "from trivium.pipeline.lease import Lease; print(Lease(Folder(Path(sys.argv[1])), 'x').take())"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert done.stdout == "None\n", done.stderr
    lease = Lease(Folder(tmp_path), "x")
    assert lease.take() is None
    assert lease.number == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("address", "sentence"),
    [
        ("ftp://somewhere/x", "is no place for a store; name one of file://, s3://, gs://, ssh://"),
        ("s3://no-such-bucket/x", r"s3://no-such-bucket/x cannot be used: .*credentials"),
    ],
)
def test_an_address_that_leads_nowhere_is_one_sentence(address, sentence, tmp_path, bucket, capsys):
    path = write_recipe(tmp_path)
    run(path, tmp_path / "runs", only=["words"])
    with pytest.raises(SystemExit) as stopped:
        main(["push", str(path), address, "--runs", str(tmp_path / "runs")])
    assert stopped.value.code == 2
    assert re.search(sentence, capsys.readouterr().err)


@pytest.mark.slow
def test_the_same_result_under_another_name_serves_its_children(tmp_path):
    """Two recipes name a stage differently; what hangs below it says the name of the one that made it."""
    path = write_recipe(tmp_path)
    url = f"file://{tmp_path / 'shared'}"
    run(path, tmp_path / "here")
    push(path, url, tmp_path / "here")
    (tmp_path / "other.yaml").write_text(
        path.read_text().replace("base", "ground").replace("toy\n", "other\n")
    )
    run(tmp_path / "other.yaml", tmp_path / "there", only=["ground"])
    assert became(pull(path, url, tmp_path / "there"))["left"] == "pulled"
    from trivium.pipeline.store import Store

    store = Store(tmp_path / "there")
    assert store.recipes()["toy"]["base"].folder.name.startswith("ground-")
    assert store.unreached() == []
