"""Programs that try to get out, to get through, or to take the machine down."""

import time
from pathlib import Path

from attack.frame import TESTS, attack, sections
from trivium.grade.code import CodeScorer, Exam

_TESTS = Exam(
    sources=(
        "def check(candidate):\n"
        "    assert candidate(3) == 9\n"
        "    assert candidate(7) == 49\n"
        "    assert candidate(-12) == 144\n"
        "    assert type(candidate(2)) is int\n",
    ),
    entry_point="f",
)


@attack("sandbox", "hostile program", cases=sections("grade/hostile/programs.py.txt"))
def hostile_program(scratch: Path, source: str) -> None:
    """No program that only attacks gets a point, and none touches a file beside its scratch folder."""
    secret = scratch / "secret.txt"
    secret.write_text("49")
    program = source.replace("@SECRET@", str(secret)).replace("@REPOSITORY@", str(TESTS.parent))
    program = program.replace("@PARENT@", str(1 << 22)).replace("@CANARY@", "trivium-attack-canary")
    start = time.monotonic()
    score = CodeScorer(seconds=1.0, memory=256 << 20).run(program, _TESTS)
    assert score.value == 0.0, score
    assert secret.read_text() == "49"
    assert time.monotonic() - start < 30
