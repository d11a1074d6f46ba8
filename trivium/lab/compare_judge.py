"""Who wins before a reward model: the answers to instructions, model against the one before."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trivium.kit.files import read_json, write_text
from trivium.kit.fingerprint import fingerprint
from trivium.lab.compare_examples import answer
from trivium.lab.formatting import compact
from trivium.lab.gather import Seen
from trivium.lab.gather_answers import code

DIGITS = 5


def judged(
    stages: Sequence[Seen], tasks: Mapping[str, Any], before: Mapping[str, str], kept: Path
) -> list[dict[str, Any]]:
    """For every reward stage, its score of each answer to an instruction; empty where there is none."""
    label = next((name for name, task in tasks.items() if task["task"] == "instructions"), None)
    judges = [stage for stage in stages if stage.record["produces"] == "reward"]
    if label is None:
        return []
    found = []
    for stage in judges:
        scores = {
            model: _scores(stage, asked["records"], first, kept)
            for first in [next(iter(tasks[label]["models"].values()))["records"]]
            for model, asked in tasks[label]["models"].items()
        }
        found.append({"judge": stage.name, "task": label, "scores": scores})
    return found


def _scores(
    stage: Seen, records: Sequence[Mapping[str, Any]], first: Sequence[Mapping[str, Any]], kept: Path
) -> list[float | None]:
    asked = [_question(one["asked"] or other["asked"] or "") for one, other in zip(records, first)]
    told = [answer(one) for one in records]
    key = fingerprint([stage.folder.name, asked, told, code()])
    place = kept / f"judged-{key}.json"
    if not place.is_file():
        from trivium.grade.learned import LearnedScorer

        assert stage.weights is not None, "a reward stage that is done has weights"
        given = LearnedScorer(stage.weights).many(asked, told)
        values = [None if one.value is None else round(one.value, DIGITS) for one in given]
        write_text(place, compact(values))
    scores: list[float | None] = read_json(place)
    return scores


def _question(asked: str) -> str:
    """The person's words alone, however the model was asked."""
    text = asked.removeprefix("user: ").removeprefix("Question: ")
    return text.removesuffix("Answer:").strip()
