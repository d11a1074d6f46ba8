"""Evolve: prompts made harder or broader (Xu et al., 2023, Evol-Instruct)."""

from typing import ClassVar, Literal

from pydantic import Field

from trivium.kit.numbers import Count
from trivium.synthesize.prompted import PromptedStep, Wanted
from trivium.synthesize.row import ANSWERS, CANDIDATES, Row, prompt_text
from trivium.synthesize.step import Room

WAYS = {
    "harder": "Make it harder: one more condition, one more step of reasoning, or a rarer case.",
    "broader": "Write another one of the same field and about as hard, on a topic that is rarer.",
}


class Evolve(PromptedStep):
    """Write a harder or a broader prompt from every row's; its old answers do not belong to it and go."""

    name: ClassVar[str] = "evolve"
    short: ClassVar[str] = "ways"

    ways: list[Literal["harder", "broader"]] = Field(default=["harder", "broader"], min_length=1)
    """What is done to a prompt; with several `rounds` or `per_row`, drawn at random."""
    per_row: Count = Field(default=1, ge=1)
    """How many new prompts from each."""
    rounds: Count = Field(default=1, ge=1)
    """How often a new prompt is changed again; only the last one is kept."""
    keep: bool = True
    """Keep the original as a row of its own."""
    template: str = (
        "Here is a task:\n\n{{ task }}\n\n{{ way }} It has to stay clear, and possible to answer without "
        "anything else. Write the new task alone."
    )
    """The prompt; `task` and `way` are filled in."""

    def answers(self, rows: float) -> tuple[float, float, int]:
        made = rows * self.per_row
        return made + rows * self.keep, made * self.rounds, self.max_new_tokens

    def run(self, rows: list[Row], room: Room) -> list[Row]:
        made = [
            row.child(f"^{place}", (*ANSWERS, CANDIDATES, "completion", "response", "score", "difficulty"))
            for row in rows for place in range(self.per_row)
        ]  # fmt: skip
        for turn in range(self.rounds):
            ways = [room.random(row.id, turn).choice(self.ways) for row in made]
            wanted = [
                Wanted(row, {"task": prompt_text(row), "way": WAYS[way]}, place % self.per_row)
                for place, (row, way) in enumerate(zip(made, ways, strict=True))
            ]
            left = []
            for one, way, reply in zip(wanted, ways, self.replies(wanted, room), strict=True):
                if reply.failure is not None:
                    room.drop(one.row, reply.failure)
                    continue
                row = one.row.child("", ("messages",), prompt=reply.text.strip())
                left.append(row.note(self.name, **self.source(room, way=way, round=turn)))
            made = left
        return [*(rows if self.keep else []), *made]
