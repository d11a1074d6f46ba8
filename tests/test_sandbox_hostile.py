"""Programs that try to get out, to get through, or to take the machine down; none may do any of it."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from trivium.grade.code import CodeScorer, Exam
from trivium.grade.sandbox import kernel
from trivium.grade.sandbox.room import Limits, Sandbox

pytestmark = pytest.mark.skipif(os.name != "posix", reason="the walls are Linux's")
FOLDER = Path(__file__).parent / "grade" / "hostile"
CANARY = "trivium-canary-7c1"

# Tests whose every assert a liar would like to satisfy without computing anything.
TESTS = Exam(
    sources=(
        "def check(candidate):\n"
        "    assert candidate(3) == 9\n"
        "    assert candidate(7) == 49\n"
        "    assert candidate(-12) == 144\n"
        "    assert type(candidate(2)) is int\n",
    ),
    entry_point="f",
)
SCORER = CodeScorer(seconds=1.0, memory=256 << 20)


def programs() -> dict[str, str]:
    found: dict[str, str] = {}
    for part in (FOLDER / "programs.py.txt").read_text().split("### ")[1:]:
        name, _, source = part.partition("\n")
        found[name.strip()] = source
    return found


PROGRAMS = programs()


def processes() -> set[str]:
    """The processes of this machine that carry the canary in their command line or are called by it."""
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if CANARY in (entry / "cmdline").read_text() + (entry / "comm").read_text():
                    found.add(entry.name)
            except OSError:
                continue
    return found


def test_there_are_at_least_sixty() -> None:
    assert len(PROGRAMS) >= 60


@pytest.mark.parametrize("name", sorted(PROGRAMS))
def test_a_hostile_program_gains_nothing(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("49")
    monkeypatch.setenv("TRIVIUM_SECRET", "49")
    program = (
        PROGRAMS[name]
        .replace("@SECRET@", str(secret))
        .replace("@PARENT@", str(os.getpid()))
        .replace("@REPOSITORY@", str(Path(__file__).parents[1]))
        .replace("@CANARY@", CANARY)
    )
    before = sorted(Path("/tmp").glob(f"*{CANARY}*")), threading.active_count()
    start = time.monotonic()
    score = SCORER.run(program, TESTS)
    assert score.value == 0.0, (name, score)
    assert time.monotonic() - start < 30
    assert (sorted(Path("/tmp").glob(f"*{CANARY}*")), threading.active_count()) == before
    assert secret.read_text() == "49"
    assert not processes()


def test_an_honest_program_passes_beside_them() -> None:
    assert SCORER.run("def f(x):\n    return x * x\n", TESTS).value == 1.0


@pytest.fixture(scope="module", params=["namespaces", "landlock"])
def room(request: pytest.FixtureRequest):
    # Asked of the kernel itself, so that walls that have fallen down fail these tests and do not skip them.
    if request.param == "landlock" and kernel.landlock_version() == 0:
        pytest.skip("this kernel has no Landlock")
    if request.param == "namespaces" and subprocess.run(["unshare", "-rmn", "true"]).returncode:
        pytest.skip("this kernel allows no namespaces")
    found = Sandbox(walls=request.param)
    yield found
    found.close()


PROBE = """
import os, socket, ctypes, sys
libc = ctypes.CDLL(None, use_errno=True)
held = []
def attempt(name, deed):
    try:
        result = deed()
    except BaseException:
        return
    if isinstance(result, int) and result < 0:
        return
    held.append(name)
for path in ("/etc/passwd", "/etc/shadow", "/root", "/home", "/proc/1/environ", "/proc/self/mem", "/sys",
             "/var/log", "@REPOSITORY@/pyproject.toml", "@SECRET@", "/dev/mem", "/dev/vda"):
    attempt("read " + path, lambda path=path: os.close(os.open(path, os.O_RDONLY)))
for path in ("/tmp/@CANARY@", "/dev/shm/@CANARY@", "/@CANARY@", "@REPOSITORY@/@CANARY@",
             os.__file__, "/usr/lib/@CANARY@"):
    attempt("write " + path, lambda path=path: os.close(os.open(path, os.O_RDWR | os.O_CREAT)))
for family in range(50):
    for kind in (1, 2, 3, 5):
        attempt(f"socket {family} {kind}", lambda: libc.socket(family, kind, 0))
attempt("socketpair", socket.socketpair)
attempt("fork", os.fork)
attempt("vfork", lambda: libc.syscall(58))
attempt("clone", lambda: libc.syscall(56, 17, 0, 0, 0, 0))
attempt("clone3", lambda: libc.syscall(435, b"\\0" * 88, 88))
attempt("exec", lambda: os.execv("/bin/true", ["true"]))
attempt("execveat", lambda: libc.syscall(322, -1, b"/bin/true", 0, 0, 0))
attempt("ptrace", lambda: libc.ptrace(0, 0, 0, 0))
attempt("kill parent", lambda: os.kill(os.getppid() or @PARENT@, 0))
attempt("kill grader", lambda: os.kill(@PARENT@, 0))
attempt("kill all", lambda: os.kill(-1, 0))
attempt("tgkill", lambda: libc.syscall(234, @PARENT@, @PARENT@, 0))
attempt("mount", lambda: libc.mount(b"none", b"/", b"tmpfs", 0, None))
attempt("unshare", lambda: libc.unshare(0x10000000))
attempt("setns", lambda: libc.setns(0, 0))
attempt("chroot", lambda: os.chroot("."))
attempt("setuid", lambda: os.setuid(0) or os.seteuid(0))
attempt("bpf", lambda: libc.syscall(321, 0, 0, 0))
attempt("io_uring", lambda: libc.syscall(425, 1, b"\\0" * 120))
attempt("userfaultfd", lambda: libc.syscall(323, 0))
attempt("perf", lambda: libc.syscall(298, 0, 0, -1, -1, 0))
attempt("keyctl", lambda: libc.syscall(250, 0, -3, 0))
attempt("memfd", lambda: os.memfd_create("x"))
attempt("shmget", lambda: libc.shmget(0, 4096, 0o1600))
attempt("process_vm_readv", lambda: libc.process_vm_readv(@PARENT@, None, 0, None, 0, 0))
attempt("pidfd_open", lambda: libc.syscall(434, @PARENT@, 0))
attempt("raise limits", lambda: __import__("resource").setrlimit(7, (4096, 4096)))
attempt("name_to_handle", lambda: libc.syscall(304, 0, 0, 0, 0, 0))
attempt("mknod", lambda: os.mknod("@CANARY@", 0o20666, os.makedev(1, 1)))
attempt("link", lambda: os.link(os.__file__, "@CANARY@"))
attempt("open fds", lambda: [os.fstat(fd) for fd in (5, 6, 7, 8, 9)])
attempt("environment", lambda: os.environ["TRIVIUM_SECRET"])
attempt("site-packages", lambda: os.listdir(os.path.dirname(os.__file__) + "/site-packages")[0])
print(held)
"""


def test_every_way_out_is_closed(room: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("1")
    monkeypatch.setenv("TRIVIUM_SECRET", "49")
    probe = PROBE.replace("@SECRET@", str(secret)).replace("@PARENT@", str(os.getpid()))
    probe = probe.replace("@REPOSITORY@", str(Path(__file__).parents[1])).replace("@CANARY@", CANARY)
    heard, said = os.pipe()
    nothing = os.open(os.devnull, os.O_RDONLY)
    with room.child(Limits(), nothing, said) as child:
        os.close(said)
        child.send({"role": "script", "program": probe})
        printed = b""
        while piece := os.read(heard, 4096):
            printed += piece
        assert child.ending()["code"] == 0
    os.close(heard)
    os.close(nothing)
    assert printed.decode().strip() == "[]"


def test_a_childs_keeper_goes_with_its_grader(room: Sandbox) -> None:
    with room.child(Limits(seconds=60.0)) as child:
        child.send({"role": "script", "program": ""})
    own = {int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()}
    kept = [process for process in own if _parent(process) == room.process.pid]
    deadline = time.monotonic() + 5
    while kept and time.monotonic() < deadline:
        time.sleep(0.02)
        kept = [process for process in kept if _parent(process) == room.process.pid]
    assert not kept


def test_nothing_outlives_a_grader_that_is_killed(tmp_path: Path) -> None:
    grader = tmp_path / "grader.py"
    grader.write_text(
        "import sys\n"
        "from trivium.grade.sandbox.room import Limits, Sandbox\n"
        "room = Sandbox()\n"
        "with room.child(Limits(seconds=600.0, cpu=600), 0, 1) as child:\n"
        "    child.send({'role': 'script', 'program': 'while True: pass'})\n"
        "    print(room.process.pid, flush=True)\n"
        "    sys.stdin.read()\n"
    )
    process = subprocess.Popen(
        [sys.executable, str(grader)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[1],
    )
    assert process.stdout is not None
    warden = int(process.stdout.readline())
    family = {warden}
    deadline = time.monotonic() + 10
    while len(family) < 3 and time.monotonic() < deadline:
        family |= {
            int(entry.name)
            for entry in Path("/proc").iterdir()
            if entry.name.isdigit() and _parent(int(entry.name)) in family
        }
    assert len(family) >= 3
    process.kill()
    process.communicate()
    while any(_alive(one) for one in family) and time.monotonic() < deadline + 10:
        time.sleep(0.02)
    assert not any(_alive(one) for one in family)


def _alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _parent(process: int) -> int:
    try:
        return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return -1


def test_a_dead_warden_is_replaced() -> None:
    from trivium.grade.sandbox.room import sandbox

    first = sandbox()
    first.process.send_signal(signal.SIGKILL)
    first.process.wait()
    assert CodeScorer().run("def f(x):\n    return x * x\n", TESTS).value == 1.0
    assert sandbox() is not first


def test_no_walls_means_no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    from trivium.kit.errors import TriviumError

    monkeypatch.setattr(
        Sandbox, "_start", lambda self, walls: None if walls == "none" else "not on this kernel"
    )
    with pytest.raises(TriviumError, match="--unsafe-sandbox"):
        Sandbox()
    assert Sandbox(unsafe=True).walls == "none"
