"""Question from answer: back-translation (Li et al., 2023, Humpback), in several styles and languages.

A model writes the question that an answer answers. Whether it is any good shows when it is answered again:
`[{question_from_answer: {}}, {answer: {samples: 4}}, {verify: {by: math, band: [0.25, 1]}}]` keeps a question
where the share of new answers that agree with the source's lies in the band; 1 minus it is its `difficulty`.
"""

from typing import ClassVar

from pydantic import Field

from trivium.kit.errors import TriviumError
from trivium.kit.numbers import Count
from trivium.synthesize.prompted import PromptedStep, Wanted, ways_of_writing
from trivium.synthesize.row import PROMPTS, Row, answer_text
from trivium.synthesize.step import Room, needs_column


class QuestionFromAnswer(PromptedStep):
    """Write questions to the answer of every row; the row's own question, if it has one, is not shown."""

    name: ClassVar[str] = "question_from_answer"
    short: ClassVar[str] = "per_row"

    per_row: Count = Field(default=1, ge=1)
    """How many questions to an answer."""
    styles: list[str] = []
    """How to ask, as in `the way a child would ask`; each question has one."""
    languages: list[str] = []
    """In which language; each question has one."""
    column: str | None = None
    """The column with the answer; the first of completion, response, answer, solution, ... else."""
    template: str = (
        "Below is an answer. Write the question that it answers, as a person would ask it who does not know "
        "the "
        "answer{% if style %}, {{ style }}{% endif %}{% if language %}, in {{ language }}{% endif %}. The "
        "question "
        "has to hold everything that is needed to find the answer. Write the question alone.\n\n{{ source }}"
    )
    """The prompt; `source` (the answer), `style` and `language` are filled in."""

    def answers(self, rows: float) -> tuple[float, float, int]:
        return rows * self.per_row, rows * self.per_row, self.max_new_tokens

    def run(self, rows: list[Row], room: Room) -> list[Row]:
        wanted = [
            Wanted(row, {"source": self._answer(row), **way}, sample)
            for row in rows
            for sample, way in enumerate(
                ways_of_writing(self.per_row, self.styles, self.languages, room.random(row.id))
            )
        ]
        found = []
        for one, reply in zip(wanted, self.replies(wanted, room), strict=True):
            mark = f"?{one.sample}"
            if reply.failure is not None:
                room.drop(one.row.child(mark), reply.failure)
                continue
            way = {name: one.columns[name] for name in ("style", "language") if one.columns[name]}
            left_out = (*PROMPTS, "messages", "completion", "response", "text")
            row = one.row.child(
                mark, left_out, prompt=reply.text.strip(), answer=one.columns["source"], **way
            )
            found.append(row.note(self.name, **self.source(room, sample=one.sample, of=one.row.id, **way)))
        return found

    def _answer(self, row: Row) -> str:
        if self.column is not None:
            return str(needs_column(row, self.column, self.name))
        found = answer_text(row)
        if found is None:
            raise TriviumError(
                f"`{self.name}`: the row {row.id} has no answer, only "
                f"{', '.join(row.fields) or 'no column'}; "
                "name its column with `column`."
            )
        return found
