"""Answer: the model answers every row's prompt, once or several times."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field, model_validator

from trivium.evals.settings import Searched
from trivium.evals.task import SEARCH_SCORER, outside, placed
from trivium.generate.search.settings import SearchSettings
from trivium.kit.numbers import Count
from trivium.model.hub import resolve
from trivium.synthesize.prompted import PromptedStep, Wanted
from trivium.synthesize.row import CANDIDATES, Row, asked
from trivium.synthesize.step import Room


class Answer(PromptedStep):
    """Answer each prompt; of several answers `verify`, `judge` or `pairs` choose, else each makes a row."""

    name: ClassVar[str] = "answer"
    short: ClassVar[str] = "samples"

    samples: Count = Field(default=1, ge=1)
    """How many answers to a prompt."""
    search: Searched | None = None
    """How each answer is searched for, such as `{method: best_of, n: 8, scorer: prm}`."""

    @model_validator(mode="after")
    def _search_is_foreseeable(self) -> Answer:
        if self.search is None:
            return self
        if self.endpoint is not None:
            raise ValueError("`search` needs our engine; leave out `endpoint`, or `search`")
        if self.temperature == 0 and "temperature" not in self.search.model_fields_set:
            raise ValueError("`search` draws several answers, which are one at `temperature: 0`; raise it")
        if self.search.most_tokens(self.max_new_tokens) is None:
            raise ValueError(f"name `token_budget` in `search`, which says what a {self.search.method} costs")
        return self

    def written(self) -> dict[str, Any]:
        """As a recipe would write it; of a search what was said, since the step says the rest."""
        found = super().written()
        del found[self.name]["search"]
        if self.search is not None:
            found[self.name]["search"] = self.search.model_dump(mode="json", exclude_unset=True)
        return found

    def mentions(self) -> list[tuple[str, str, tuple[str, ...]]]:
        named = [] if self.search is None else outside({"search": self.search})
        return [
            *super().mentions(),
            *(
                ("search.scorer", name, ("reward",) if option == SEARCH_SCORER else ("source",))
                for option, name in named
            ),
        ]

    def _search(self, room: Room) -> SearchSettings | None:
        """The search with the step's own settings where it says none, and its scorer where that lies."""
        if self.search is None:
            return None

        def place(option: str, name: str) -> str:
            where = room.where.get(name, room.base / name)
            return str(resolve(str(where)) if option == SEARCH_SCORER else where)

        spec = placed({"search": self.search.model_dump(exclude_unset=True)}, place)
        assert isinstance(spec, dict)
        own = {name: getattr(self, name) for name in ("temperature", "top_p", "max_new_tokens")}
        return SearchSettings.model_validate({**own, **spec["search"]})

    def answers(self, rows: float) -> tuple[float, float, int]:
        most = self.search.most_tokens(self.max_new_tokens) if self.search is not None else None
        return rows, rows * self.samples, most or self.max_new_tokens

    def run(self, rows: list[Row], room: Room) -> list[Row]:
        search = self._search(room)
        wanted = [
            Wanted(row, sample=sample, messages=self._asked(row, room), search=search)
            for row in rows for sample in range(self.samples)
        ]  # fmt: skip
        replies = self.replies(wanted, room)
        found = []
        for place, row in enumerate(rows):
            mine = replies[place * self.samples : (place + 1) * self.samples]
            good = [
                {"text": one.text.strip(), "sample": sample}
                for sample, one in enumerate(mine)
                if one.failure is None
            ]
            for sample, one in enumerate(mine):
                if one.failure is not None and (good or sample):
                    room.drop(row.child(f"#{sample}", completion=one.text), one.failure)
            if not good:
                room.drop(row, mine[0].failure or "")
                continue
            made = row.child("", ("completion", "response", CANDIDATES))
            if self.samples == 1:
                made.fields["completion"] = good[0]["text"]
            else:
                made.fields[CANDIDATES] = good
            method = None if search is None else search.method
            facts = self.source(room, samples=len(good), search=method)
            found.append(made.note(self.name, **facts))
        return found

    def _asked(self, row: Row, room: Room) -> list[dict[str, str]] | None:
        return asked(row) if not self.template else None
