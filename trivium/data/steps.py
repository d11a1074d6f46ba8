"""Solutions step by step to tokens: TRL's stepwise form, and ProcessBench's, with a label for every step.

A row is `prompt`, `completions` (the steps) and `labels` (a bool for each). Every step is followed by a
separator, and its label lies at the separator's last token, where a process reward model gives its score:

    [prompt] step_1 sep | step_2 sep | ...        labels at the last token of each sep

A label may be a share from 0 to 1 (a soft label), or null for a step about which nothing is known.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from trivium.data.counted import CountedBatches, RowReader
from trivium.data.rows import PackedSequence, row_of_documents
from trivium.data.shapes import Fields, is_messages, messages_of, parsed, text_of
from trivium.data.sources import Document
from trivium.kit.errors import TriviumError
from trivium.tokens.tokenizer import Tokenizer

PromptContent = str | Sequence[Mapping[str, Any]]
SEPARATOR = "\n"
PROCESS_BENCH = ("steps", "label")
"""The columns of ProcessBench (2412.06559): the steps, and the number of the first wrong one or -1."""


@dataclass(frozen=True)
class StepSolution:
    """A prompt with a solution as tokens [tokens], and the places [steps] at which its steps end."""

    id: str
    tokens: np.ndarray
    places: np.ndarray
    labels: np.ndarray
    """How right each step is, from 0 to 1; NaN where nothing is known: [steps]."""
    prompt_tokens: int = 0
    cut: bool = False
    """Whether its last steps did not fit."""

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def prompt(self) -> np.ndarray:
        return self.tokens[: self.prompt_tokens]


def prompt_ids(prompt: PromptContent, tokenizer: Tokenizer) -> list[int]:
    """A text after the token that begins texts, or a conversation up to where the assistant answers."""
    if isinstance(prompt, str):
        first = [] if tokenizer.beginning_id is None else [tokenizer.beginning_id]
        return [*first, *tokenizer.encode(prompt)]
    return tokenizer.encode_prompt([dict(one) for one in prompt])


def step_ids(steps: Sequence[str], separator: str, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """The tokens of all steps, each tokenised alone before its separator, and the places of their ends."""
    after = tokenizer.encode(separator)
    if not after:
        raise TriviumError("the `separator` of steps has no token; name a text such as '\\n'.")
    tokens: list[int] = []
    places = []
    for step in steps:
        tokens += [*tokenizer.encode(step), *after]
        places.append(len(tokens) - 1)
    return tokens, places


def split_steps(text: str, separator: str = SEPARATOR) -> list[str]:
    """The steps of a solution: its parts between separators that are not blank."""
    return [step for step, _ in step_ends(text, separator)]


def step_ends(text: str, separator: str = SEPARATOR) -> list[tuple[str, int]]:
    """The steps of a solution, each with the place in the text right after its separator."""
    found, place = [], 0
    for part in text.split(separator):
        place = min(place + len(part) + len(separator), len(text))
        if part.strip():
            found.append((part, place))
    return found


def labelled_steps(fields: Fields) -> tuple[PromptContent, list[str], list[float]]:
    """The prompt, the steps and their labels (NaN: unknown) of a row, in TRL's form or ProcessBench's."""
    asked = next((name for name in ("prompt", "problem", "question") if fields.get(name)), None)
    if asked is None:
        raise TriviumError("has no `prompt`")
    prompt: PromptContent = (
        messages_of(fields[asked], asked) if is_messages(fields[asked]) else text_of(fields, asked)
    )
    bench = all(fields.get(name) is not None for name in PROCESS_BENCH) and "completions" not in fields
    column = "steps" if bench else "completions"
    if fields.get(column) is None:
        raise TriviumError(
            f"holds {', '.join(map(repr, fields)) or 'nothing'}: neither `prompt`, `completions` and "
            "`labels` nor ProcessBench's `problem`, `steps` and `label`; name yours with `columns`"
        )
    steps = parsed(fields[column], column, list)
    if not steps or not all(isinstance(step, str) and step for step in steps):
        raise TriviumError(f"has `{column}` that are no list of texts, one for each step")
    if bench:
        first = fields["label"]
        if isinstance(first, bool) or not isinstance(first, int) or not -1 <= first < len(steps):
            raise TriviumError(f"has the `label` {first!r}, which is neither -1 nor the number of a step")
        known = len(steps) if first < 0 else first
        return (
            prompt,
            steps,
            [1.0] * known + [0.0, *[np.nan] * (len(steps) - known - 1)][: len(steps) - known],
        )
    labels = parsed(fields.get("labels"), "labels", list)
    if len(labels) != len(steps):
        raise TriviumError(f"has {len(steps)} `completions` and {len(labels)} `labels`; every step needs one")
    return prompt, steps, [_label(one) for one in labels]


def up_to_first_error(labels: Sequence[float]) -> list[float]:
    """The labels up to the first wrong step, and NaN after it."""
    first = next((place for place, label in enumerate(labels) if label < 0.5), len(labels))
    return [label if place <= first else float("nan") for place, label in enumerate(labels)]


def _label(value: Any) -> float:
    if value is None:
        return float("nan")
    if not isinstance(value, bool | int | float) or not 0 <= value <= 1:
        raise TriviumError(f"has the label {value!r}, which is neither true, false nor a share from 0 to 1")
    return float(value)


class StepData(RowReader[StepSolution]):
    """Reads the solutions of one source, without the steps that do not fit."""

    def __init__(
        self, tokenizer: Tokenizer, context: int, separator: str = SEPARATOR, *, until_error: bool = False
    ) -> None:
        """With `until_error` the steps after the first wrong one have no label."""
        super().__init__()
        self.tokenizer, self.context, self.separator = tokenizer, context, separator
        self.until_error = until_error
        self.tally.shape = "stepwise supervision (prompt, completions, labels)"

    def parsed(self, fields: Fields) -> tuple[list[int], list[int], list[int], list[float]]:
        prompt, steps, labels = labelled_steps(fields)
        if self.until_error:
            labels = up_to_first_error(labels)
        before = prompt_ids(prompt, self.tokenizer)
        return before, *step_ids(steps, self.separator, self.tokenizer), labels

    def fitted(self, document: Document, *parsed: Any) -> StepSolution | None:
        before, tokens, places, labels = parsed
        whole = len(before) + len(tokens)
        fitting = [place for place in places if len(before) + place < self.context]
        known = ~np.isnan(np.array(labels[: len(fitting)]))
        size = len(before) + fitting[-1] + 1 if fitting else 0
        why = "has no label" if fitting else f"has no step that fits into a `context` of {self.context}"
        cut = f"lost its last {len(places) - len(fitting)} steps, {whole - size} tokens"
        if not self.tally.settle(document, whole, size, int(known.sum()), why=why, cut=cut):
            return None
        return StepSolution(
            document.id,
            np.array([*before, *tokens][:size], dtype=np.int64),
            np.array(fitting, dtype=np.int64) + len(before),
            np.array(labels[: len(fitting)]),
            len(before),
            size < whole,
        )


def row_of_steps(solutions: Sequence[StepSolution], sources: Sequence[int] | None = None) -> PackedSequence:
    """Solutions end to end; the columns `step` (whether a label lies here) and `label`, [tokens] each."""
    columns: dict[str, list[np.ndarray]] = {"step": [], "label": []}
    learned = []
    for one in solutions:
        known = ~np.isnan(one.labels)
        marks, labels = np.zeros(len(one), dtype=np.float32), np.zeros(len(one), dtype=np.float32)
        marks[one.places[known]], labels[one.places[known]] = 1.0, one.labels[known]
        columns["step"].append(marks)
        columns["label"].append(labels)
        # No token is predicted here; what counts as learned is the solution after its prompt.
        learned.append((np.arange(len(one)) >= one.prompt_tokens).astype(np.float32))
    return row_of_documents(
        [one.tokens for one in solutions], learned=learned, columns=columns,
        ids=[one.id for one in solutions], sources=sources,
    )  # fmt: skip


class StepBatches(CountedBatches[StepSolution]):
    """Labelled solutions as batches, a row for each."""

    changed: ClassVar[str] = "solutions, their labels or the seed have changed"

    def identity(self, item: StepSolution) -> Any:
        return [item.id, np.nan_to_num(item.labels, nan=-1).tolist()]

    def rows(self, step: int) -> list[PackedSequence]:
        return [
            row_of_steps([self.sources[source].items[number]], [source])
            for source, number in self.plan.rows(step)
        ]
