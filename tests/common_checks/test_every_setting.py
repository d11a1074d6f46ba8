"""No setting is dead: moved off its default, each changes what its description says."""

from __future__ import annotations

import lines_adapters  # noqa: F401
import lines_answers  # noqa: F401
import lines_curate  # noqa: F401
import lines_distill  # noqa: F401
import lines_engines  # noqa: F401
import lines_forecast  # noqa: F401
import lines_growth  # noqa: F401
import lines_modalities  # noqa: F401
import lines_models  # noqa: F401
import lines_online  # noqa: F401
import lines_quality  # noqa: F401
import lines_reports  # noqa: F401
import lines_rollouts  # noqa: F401
import lines_search  # noqa: F401
import lines_sources  # noqa: F401
import lines_steps  # noqa: F401
import lines_synthesize  # noqa: F401
import lines_training  # noqa: F401
import pytest
from benches import Bench
from every_field import every_setting
from lines import BASES, LINES, Line, choices_never_made, of_nothing, repeated, without_a_line
from products import differences
from pydantic import ValidationError

from trivium.kit.errors import TriviumError


def test_every_setting_has_a_line() -> None:
    missing = without_a_line()
    first = f'@moves("{missing[0].path}", VALUE, kinds=["{missing[0].kind}"])' if missing else ""
    assert not missing, (
        f"{', '.join(map(str, missing))}: no line moves it. Add one to a file lines_*.py in this folder, "
        f"as `{first}` over a check(before, after) of what its description says."
    )


def test_every_choice_is_made_by_some_line() -> None:
    never = choices_never_made()
    assert not never, f"No line moves these settings to these of their values, add them: {never}."


def test_every_line_moves_a_setting_that_there_is() -> None:
    stale = of_nothing()
    assert not stale, (
        f"No kind has these settings any more, rename or remove their lines: {[*map(str, stale)]}."
    )


def test_every_kind_has_a_stage_to_move() -> None:
    missing = sorted({one.kind for one in every_setting()} - BASES.keys())
    assert not missing, f"Add to BASES in lines.py a stage of the kind {missing[0]} that ends in a moment."


REPEATED = repeated()
# In a hurry, some settings of every kind are moved, each once.
CASES = [
    pytest.param(line, id=str(line), marks=[pytest.mark.slow] if place in REPEATED else [])
    for place, line in enumerate(LINES)
]


@pytest.mark.quick_cases(100)
@pytest.mark.parametrize("line", CASES)
def test_a_setting_changes_what_its_description_says(bench: Bench, line: Line) -> None:
    how = {"fault": line.fault, "trained": line.trained}
    if line.refused is not None:
        if line.fault is None:
            bench.known_run(line.kind, line.settings(moved=False), **how)
        with pytest.raises((TriviumError, ValidationError)) as refusal:
            bench.run(line.kind, line.settings(moved=True), **how)
        assert line.refused in str(refusal.value)
        return
    before = bench.known_run(line.kind, line.settings(moved=False), **how)
    after = bench.run(line.kind, line.settings(moved=True), **how)
    assert line.check is not None
    line.check(before, after)
    if before.counted == after.counted and line.trained:
        assert not differences(before, after), "the result changes and its fingerprint does not"
