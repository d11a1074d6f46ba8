"""The lock on a stage: held for life, free after a death, across namespaces, machines and versions."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from trivium.kit.errors import TriviumError
from trivium.pipeline import lock as module
from trivium.pipeline.lock import holder, locked, reaches_all_machines

HOLDS = """\
import socket, sys, time
from pathlib import Path
from trivium.pipeline.lock import locked
if len(sys.argv) > 2:
    socket.gethostname = lambda: sys.argv[2]
with locked(Path(sys.argv[1]), print, wait=False):
    print("held", flush=True)
    time.sleep(60)
"""


def own_namespaces() -> list[str]:
    """The words that start a command in PID and UTS namespaces of its own, where this machine allows it."""
    words = ["unshare", "--pid", "--uts", "--fork", "--mount-proc", "--kill-child"]
    try:
        allowed = subprocess.run([*words, "true"], capture_output=True).returncode == 0
    except FileNotFoundError:
        allowed = False
    return words if allowed else []


def hold(entry: Path, *words: str, before: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    """A process that holds an entry until it is killed."""
    command = [*before, sys.executable, "-c", HOLDS, str(entry), *words]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    said = process.stdout.readline()
    assert said == "held\n", said + process.stdout.read()
    return process


def end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


def is_refused(entry: Path) -> bool:
    try:
        with locked(entry, print, wait=False):
            return False
    except TriviumError:
        return True


def test_two_processes_that_see_neither_each_others_numbers_nor_names(tmp_path: Path) -> None:
    """Two containers on one store: the number of the other's process means another process here, or none."""
    before = tuple(own_namespaces())
    process = hold(tmp_path / "entry", "elsewhere", before=before)
    written = json.loads((tmp_path / "entry" / "LOCK").read_text())
    assert written["host"] == "elsewhere"
    if before:
        assert written["pid"] < process.pid
        assert written["namespace"] != os.readlink("/proc/self/ns/pid")
    try:
        found = holder(tmp_path / "entry")
        assert found is not None
        assert found.host == "elsewhere"
        assert is_refused(tmp_path / "entry")
    finally:
        end(process)
    assert holder(tmp_path / "entry") is None
    assert not is_refused(tmp_path / "entry")


def test_the_same_host_name_in_another_namespace_is_another_process(tmp_path: Path) -> None:
    """What failed before: one host name, and the number of the one that holds it unknown here."""
    process = hold(tmp_path / "entry", before=tuple(own_namespaces()))
    path = tmp_path / "entry" / "LOCK"
    # What it looks like where this machine does not allow namespaces: no such number, the same host.
    written = json.loads(path.read_text()) | {"pid": 2**22 - 1, "host": socket.gethostname()}
    path.write_text(json.dumps(written))
    try:
        assert holder(tmp_path / "entry") is not None
        assert is_refused(tmp_path / "entry")
    finally:
        end(process)
    assert not is_refused(tmp_path / "entry")
    assert not path.exists()


def test_a_lock_is_free_as_soon_as_its_process_is_dead_though_a_child_of_it_lives(tmp_path: Path) -> None:
    def with_child(entry: str, tell: int) -> None:
        with locked(Path(entry), print):
            child = os.fork()
            if child == 0:
                time.sleep(60)
                os._exit(0)
            os.write(tell, str(child).encode())
            time.sleep(60)

    heard, tell = os.pipe()
    arguments = (str(tmp_path / "entry"), tell)
    process = multiprocessing.get_context("fork").Process(target=with_child, args=arguments)
    process.start()
    child = int(os.read(heard, 20))
    try:
        assert holder(tmp_path / "entry") is not None
        process.kill()
        process.join()
        assert holder(tmp_path / "entry") is None
        assert not is_refused(tmp_path / "entry")
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_look_at_a_lock_never_keeps_it_from_a_process(tmp_path: Path) -> None:
    """`status` and `watch` look all the time; a run that starts meanwhile must not be refused."""
    (tmp_path / "entry").mkdir()
    (tmp_path / "entry" / "LOCK").write_text("{}")
    looks = multiprocessing.get_context("fork").Process(target=look_for_ever, args=(tmp_path / "entry",))
    looks.start()
    try:
        for _ in range(200):
            assert not is_refused(tmp_path / "entry")
    finally:
        looks.kill()
        looks.join()


def look_for_ever(entry: Path) -> None:
    while True:
        holder(entry)


def test_a_machine_whose_locks_are_not_seen_counts_as_alive(tmp_path: Path, monkeypatch) -> None:
    """Two machines on one network file system that keeps locks to itself."""
    lock = tmp_path / "entry" / "LOCK"
    with locked(tmp_path / "entry", print):
        me = json.loads(lock.read_text())
    assert me["boot"]
    lock.write_text(json.dumps({**me, "boot": "another"}))
    mounts = tmp_path / "mountinfo"
    line = f"36 35 0:42 / {tmp_path} rw,relatime shared:1 - {{}} server:/export {{}}\n"
    monkeypatch.setattr(module, "MOUNTS", str(mounts))
    for kind, options, seen in [
        ("ext4", "rw", True), ("nfs4", "rw,vers=4.2,local_lock=none", True), ("lustre", "rw,flock", True),
        ("nfs", "rw,local_lock=flock", False), ("nfs", "rw,nolock", False), ("lustre", "rw,noflock", False),
        ("cifs", "rw", False), ("fuse.sshfs", "rw", False), ("9p", "rw", False),
    ]:  # fmt: skip
        mounts.write_text("22 1 0:2 / / rw - overlay overlay rw\n" + line.format(kind, options))
        assert reaches_all_machines(lock) == seen, kind
        assert (holder(lock.parent) is None) == seen, kind
        assert is_refused(lock.parent) == (not seen), kind
        lock.write_text(json.dumps({**me, "boot": "another"}))
    # Cut off while it was written, on a machine that cannot be asked.
    lock.write_text("")
    assert is_refused(lock.parent)
    lock.write_text(json.dumps(me))
    assert not is_refused(lock.parent)
    assert not lock.exists()


def test_what_a_process_of_an_older_version_wrote_is_honoured(tmp_path: Path) -> None:
    """Versions before held no `flock`: the number of the process and its start are all there is."""
    lock = tmp_path / "entry" / "LOCK"
    with locked(tmp_path / "entry", print):
        me = json.loads(lock.read_text())
    old = {name: me[name] for name in ("pid", "host", "started", "since")}
    for written, is_alive in [
        (old, True), ({**old, "started": "1"}, False), ({**old, "pid": 2**22 - 1}, False),
        ({**old, "host": "another-machine"}, True),
    ]:  # fmt: skip
        lock.write_text(json.dumps(written))
        assert (holder(lock.parent) is not None) == is_alive
        assert is_refused(lock.parent) == is_alive
    lock.write_text('{"pid": 12')
    assert holder(lock.parent) is None
    assert not is_refused(lock.parent)


def test_without_flock_the_process_itself_is_asked(tmp_path: Path, monkeypatch) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(module.fcntl, "flock", unsupported)
    with locked(tmp_path / "entry", print):
        me = json.loads((tmp_path / "entry" / "LOCK").read_text())
        assert is_refused(tmp_path / "entry")
    assert not is_refused(tmp_path / "entry")
    for change, is_alive in [
        ({"started": "1"}, False), ({"namespace": "pid:[1]"}, True), ({"boot": "another"}, True),
    ]:  # fmt: skip
        (tmp_path / "entry" / "LOCK").write_text(json.dumps({**me, **change}))
        assert is_refused(tmp_path / "entry") == is_alive
