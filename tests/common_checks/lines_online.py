"""Settings of online preferences: how the model is asked, and who judges what it answers."""

from __future__ import annotations

from typing import Any

from lines import moves, refuses
from tiny_run import Seen

from trivium.kit.metrics import read_metrics

ONLY = ["preference"]
ONLINE = {"data": "problems.jsonl", "reward": ["mine.py:spread"], "online": {"max_new_tokens": 6}}


def written(seen: Seen) -> list[dict[str, Any]]:
    """The answers that were written down for a person."""
    return read_metrics(seen.folder / "completions.jsonl")


@moves("reward", ["mine.py:shortness"], kinds=ONLY, both=ONLINE)
def reward(before: Seen, after: Seen) -> None:
    assert "rewards/spread/mean" in before.log[0]
    assert "rewards/shortness/mean" in after.log[0]


refuses("reward", ["math"], "say `online: true`", kinds=ONLY)
refuses("online", True, "`online` needs a judge", kinds=ONLY, beside={"data": "problems.jsonl"})


@moves("online.num_generations", 4, kinds=ONLY, both=ONLINE)
def num_generations(before: Seen, after: Seen) -> None:
    """Of more answers the best and the worst are further apart."""
    assert after.column("objective/scores_margin")[0] > before.column("objective/scores_margin")[0]


@moves("online.max_new_tokens", 3, kinds=ONLY, both=ONLINE)
def max_new_tokens(before: Seen, after: Seen) -> None:
    assert max(before.column("completions/max_length")) > 3
    assert max(after.column("completions/max_length")) <= 3


@moves("online.temperature", 0.1, kinds=ONLY, both={**ONLINE, "loss": "simpo"})
def likelier_answers(before: Seen, after: Seen) -> None:
    assert after.column("logps/chosen")[0] > before.column("logps/chosen")[0]


@moves("online.prompt_template", "Q: {prompt} A:", kinds=ONLY, both=ONLINE)
def prompt_template(before: Seen, after: Seen) -> None:
    assert not any(row["prompt"].startswith("Q: ") for row in written(before))
    assert all(row["prompt"].startswith("Q: ") for row in written(after))


@moves("online.stop", [" "], kinds=ONLY, both=ONLINE)
def stop(before: Seen, after: Seen) -> None:
    assert after.column("val/contain_eos_token")[0] > before.column("val/contain_eos_token")[0]


@moves("online.missing_eos_penalty", 100.0, kinds=ONLY, both={**ONLINE, "online.stop": [" "]})
def missing_eos_penalty(before: Seen, after: Seen) -> None:
    """What was cut off is worth less."""
    share = 1 - before.column("val/contain_eos_token")[0]
    assert share > 0
    apart = before.column("objective/scores")[0] - after.column("objective/scores")[0]
    assert abs(apart - 100 * share) < 1e-3


@moves("online.max_rows", 1, kinds=ONLY, both=ONLINE)
def one_at_a_time(before: Seen, after: Seen) -> None:
    """The same answers, as each has a seed of its own."""
    assert [row["completion"] for row in written(after)][:4] == [
        row["completion"] for row in written(before)
    ][:4]
