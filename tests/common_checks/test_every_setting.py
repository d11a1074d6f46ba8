"""No setting is dead: moved off its default, each changes what its description says."""

from __future__ import annotations

import lines_adapters  # noqa: F401
import lines_models  # noqa: F401
import lines_sources  # noqa: F401
import lines_training  # noqa: F401
import pytest
from benches import Bench
from lines import LINES, Line
from products import differences
from pydantic import ValidationError

from trivium.kit.errors import TriviumError


@pytest.mark.parametrize("line", LINES, ids=str)
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
    if before.stage.counted() == after.stage.counted() and line.trained:
        assert not differences(before, after), "the result changes and its fingerprint does not"
