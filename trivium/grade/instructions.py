"""The scorer of instructions: checks a program can make, IFEval's by their names and the embedded world's."""

import json
import re
from dataclasses import dataclass
from typing import Any

from trivium.grade.ifeval import CHECKS
from trivium.grade.maths.extract import after_thinking
from trivium.grade.scorer import Score
from trivium.kit.errors import TriviumError
from trivium.world.checks import check_names, fulfils


@dataclass(frozen=True)
class InstructionsScorer:
    """One where every instruction is followed; with `partial`, the share; `loose` as IFEval reads loosely."""

    name: str = "instructions"
    partial: bool = False
    loose: bool = False

    def __call__(self, completion: str, **columns: Any) -> Score:
        checks = checks_of(columns)
        spoken = after_thinking(completion)
        if spoken is None or not spoken.strip():
            return Score(0.0, "there is no answer", "unparsed")
        readings = loosened(spoken) if self.loose else [spoken]
        failed = []
        for check in checks:
            if not any(reading.strip() and follows(reading, check) for reading in readings):
                failed.append(str(check["check"]))
        if not failed:
            return Score(1.0, f"all of {len(checks)} instructions are followed", "ok")
        value = 1 - len(failed) / len(checks) if self.partial else 0.0
        return Score(value, f"{len(checks) - len(failed)} of {len(checks)} instructions are followed; "
                     f"not {', '.join(failed)}", "wrong")  # fmt: skip


def follows(text: str, check: dict[str, Any]) -> bool:
    """Whether a text passes one check."""
    name, arguments = check["check"], check.get("arguments") or {}
    if not isinstance(name, str) or not isinstance(arguments, dict):
        raise TriviumError(f"A check is a name and an object of arguments, not {str(check)[:80]!r}.")
    try:
        if name in CHECKS:
            return bool(
                CHECKS[name](text, **{key: value for key, value in arguments.items() if value is not None})
            )
        if name in check_names():
            return fulfils(text, {"check": name, "arguments": arguments})
    except (TypeError, ValueError, AttributeError, LookupError) as error:
        raise TriviumError(f"The check {name!r} does not take these arguments: {error}.") from error
    raise TriviumError(
        f"There is no check called {name!r}; there are {', '.join([*CHECKS, *check_names()])}."
    )


def checks_of(columns: dict[str, Any]) -> list[dict[str, Any]]:
    """The checks of a row: {check, arguments}, a list of them, or IFEval's instruction_id_list and kwargs."""
    if columns.get("instruction_id_list"):
        names = columns["instruction_id_list"]
        arguments = columns.get("kwargs") or [{} for _ in names]
        if not isinstance(names, list) or not isinstance(arguments, list) or len(names) != len(arguments):
            raise TriviumError("IFEval's instruction_id_list and kwargs are two lists of one length.")
        return [{"check": name, "arguments": part or {}} for name, part in zip(names, arguments, strict=True)]
    for name in ("instructions", "checks", "check"):
        found = columns.get(name)
        if isinstance(found, str) and found.lstrip()[:1] in ("[", "{"):
            try:
                found = json.loads(found)
            except (ValueError, RecursionError) as error:
                raise TriviumError(f"The column {name} is not JSON: {error}.") from error
        if isinstance(found, str):
            found = {"check": found, "arguments": columns.get("arguments") or {}}
        if isinstance(found, dict):
            found = [found]
        if (
            isinstance(found, list)
            and found
            and all(isinstance(part, dict) and "check" in part for part in found)
        ):
            return found
    raise TriviumError(
        "The scorer 'instructions' needs a column `check`, `checks` or `instructions` with {check, "
        "arguments}, or IFEval's instruction_id_list and kwargs; the row has "
        f"{', '.join(sorted(columns)) or 'none'}."
    )


def loosened(text: str) -> list[str]:
    """The text, and it without its first line, its last, both, and each without stars."""
    lines = text.split("\n")
    cut = [text, "\n".join(lines[1:]), "\n".join(lines[:-1]), "\n".join(lines[1:-1])]
    return [*cut, *(re.sub(r"\*", "", part) for part in cut)]
