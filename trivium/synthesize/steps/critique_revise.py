"""Critique and revise: answers held to principles of a constitution (Bai et al., 2022, Constitutional AI)."""

from typing import ClassVar

from pydantic import Field

from trivium.kit.numbers import Count
from trivium.synthesize.prompted import PromptedStep, Wanted
from trivium.synthesize.row import CANDIDATES, Row, expanded, prompt_text
from trivium.synthesize.step import Room, needs_column

CONSTITUTION = [
    "It is honest: it claims nothing that is not known, and says what it does not know.",
    "It is helpful: it does what was asked, completely and to the point.",
    "It is harmless: it does not help to hurt people.",
]


class CritiqueRevise(PromptedStep):
    """Criticise each answer by a principle and revise it: the revision is `chosen`, the first one
    `rejected`."""

    name: ClassVar[str] = "critique_revise"
    short: ClassVar[str] = "constitution"

    constitution: list[str] = Field(default=CONSTITUTION, min_length=1)
    """The principles; each round takes one at random."""
    rounds: Count = Field(default=1, ge=1)
    """How often an answer is criticised and revised."""
    pairs: bool = True
    """Make preference pairs; else the revision takes the answer's place."""
    template: str = (
        "A request:\n{{ request }}\n\nAn answer:\n{{ candidate }}\n\nA principle: {{ principle }}\n\nSay in "
        "at most "
        "three sentences where the answer falls short of the principle."
    )
    """The prompt for the critique; `request`, `candidate` and `principle` are filled in."""
    revise: str = (
        "A request:\n{{ request }}\n\nAn answer:\n{{ candidate }}\n\nWhat is wrong with it: "
        "{{ critique }}\n\n"
        "Write the answer again so that nothing of that is wrong with it. Write the new answer alone."
    )
    """The prompt for the revision; `critique` is filled in as well."""

    def answers(self, rows: float) -> tuple[float, float, int]:
        return rows, rows * 2 * self.rounds, self.max_new_tokens

    def run(self, rows: list[Row], room: Room) -> list[Row]:
        rows = [one for row in rows for one in expanded(row)]
        first = {row.id: str(row.fields.get("completion", "")) for row in rows}
        for turn in range(self.rounds):
            wanted = [
                Wanted(
                    row,
                    {
                        "request": prompt_text(row), "candidate": needs_column(row, "completion", self.name),
                        "principle": room.random(row.id, turn).choice(self.constitution),
                    },
                )
                for row in rows
            ]  # fmt: skip
            rows = self._revised(wanted, room)
        if not self.pairs:
            return rows
        found = []
        for row in rows:
            revision = row.fields["completion"]
            if revision.strip() == first[row.id].strip():
                room.drop(row, "unchanged: the revision is the first answer")
                continue
            found.append(row.child("", ("completion", CANDIDATES), chosen=revision, rejected=first[row.id]))
        return found

    def _revised(self, wanted: list[Wanted], room: Room) -> list[Row]:
        revising = self.model_copy(update={"template": self.revise})
        second, found = [], []
        for one, reply in zip(wanted, self.replies(wanted, room), strict=True):
            if reply.failure is not None:
                room.drop(one.row, f"no critique: {reply.failure}")
            else:
                second.append(Wanted(one.row, {**one.columns, "critique": reply.text.strip()}))
        for one, reply in zip(second, revising.replies(second, room), strict=True):
            if reply.failure is not None:
                room.drop(one.row, f"no revision: {reply.failure}")
                continue
            facts = {"principle": one.columns["principle"], "critique": one.columns["critique"]}
            row = one.row.child(completion=reply.text.strip())
            found.append(row.note(self.name, **self.source(room, **facts)))
        return found
