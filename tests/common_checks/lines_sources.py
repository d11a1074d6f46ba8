"""What a recipe says of a source: its part in a mixture, and how its documents are read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from lines import ANSWERS, LINES, Line
from tiny_run import ROWS, Seen

from trivium.data.shards import Shards
from trivium.kit.metrics import read_metrics
from trivium.tokens.tokenizer import Tokenizer

Texts = dict[str, str]
LEARNED, MEASURED, JUDGED, TESTED, POSED, READ = "learned", "measured", "judged", "tested", "posed", "read"


def tokenised(seen: Seen, file: str) -> Texts:
    """What was tokenised for this stage, trained on or held out."""
    found: Texts = {}
    tokenizer = tokenizer_of(seen)
    for manifest in (
        *seen.folder.rglob("tokenised/*/manifest.json"),
        *seen.folder.glob("data/manifest.json"),
    ):
        for split in ("train", "validation"):
            shards = Shards(manifest.parent, split)
            for index in range(len(shards)):
                if file in shards.id(index):
                    found[shards.id(index)] = tokenizer.decode(shards.document(index).tolist())
    return found


def trained(seen: Seen, file: str) -> Texts:
    """The documents of the batches."""
    found: Texts = {}
    tokenizer = tokenizer_of(seen)
    for row in (row for rows in seen.batches for row in rows):
        ends = np.cumsum(row.lengths).tolist()
        for name, start, end in zip(row.ids, [0, *ends], ends):
            if file in name:
                found[name] = found.get(name, "") + tokenizer.decode(row.tokens[start:end].tolist())
    return found


def posed(seen: Seen, file: str) -> Texts:
    """The prompts that were answered and written down."""
    written = [*seen.folder.glob("completions.jsonl"), *seen.folder.glob("report/answers.jsonl")]
    lines = [row for path in written for row in read_metrics(path)]
    return {row.get("problem", row.get("id")): row["prompt"] for row in lines}


def solved(seen: Seen, file: str) -> Texts:
    """The problems whose solutions were labelled."""
    rows = read_metrics(seen.folder / "data" / "train.jsonl")
    return {row["id"].rpartition("/")[0]: row["prompt"] for row in rows}


def asked(seen: Seen, file: str) -> Texts:
    """The questions that are learned from or held out."""
    lines = [row for path in seen.folder.rglob("*.jsonl") for row in read_metrics(path)]
    return {
        f"{file}{('test', 'train')[number % 2]}:{number}": row["messages"][0]["content"]
        for row in lines
        for number, one in enumerate(ROWS["questions"], start=1)
        if row["messages"][0]["content"].endswith((one["question"], one["other"]))
    }


def written(seen: Seen, file: str) -> Texts:
    """The prompts of the rows that were written."""
    rows = read_metrics(seen.folder / "data" / "rows.jsonl")
    return {row["id"]: row["prompt"] for row in rows if row["id"].startswith(file)}


def tokenizer_of(seen: Seen) -> Tokenizer:
    """The tokenizer that the stage left, or that of the model it looked at."""
    places = (seen.place / "model", seen.folder / "data" / "tokenizer", seen.inputs.get("base"))
    return Tokenizer.load(next(path for path in places if path is not None and path.is_dir()))


@dataclass(frozen=True)
class Place:
    """A setting that names sources."""

    kind: str
    setting: str
    role: str
    """What becomes of what it names."""
    file: str
    """The beginning of the names of its files."""
    read: Callable[[Seen, str], Texts]
    """The text of the documents that took part, by their ids."""
    column: str = "text"
    listed: bool = False
    """Whether it is a list of sources, each with its `path`, and not a mixture."""
    measured: Callable[[Seen], Any] = lambda seen: None
    """What was measured, where nothing is trained on."""
    both: dict[str, Any] = field(default_factory=dict)

    def naming(self, **sources: dict[str, Any]) -> dict[str, Any]:
        """The setting when it names these sources, each with what is said of it."""
        names = {"file": f"{self.file}.jsonl", "more": f"more-{self.file}.jsonl", "notes": "notes.txt",
                 "damaged": f"damaged-{self.file}.jsonl", "halves": f"halves-{self.file}"}  # fmt: skip
        named = {names.get(key, key): wishes for key, wishes in sources.items()}
        return {self.setting: [{"path": key, **one} for key, one in named.items()] if self.listed else named}


def _documents(seen: Seen) -> Any:
    return [row["documents"] for row in seen.summary["candidates"]]


LONGER = {"steps": 4}
PLACES = [
    Place("pretrain", "data", LEARNED, "texts", tokenised, both={"tokenizer": "words"}),
    Place("midtrain", "data", LEARNED, "texts", tokenised),
    Place("midtrain", "replay.data", LEARNED, "texts", tokenised,
          both={"data": "others", "replay.share": 0.5}),
    Place(
        "midtrain", "watch", MEASURED, "others", tokenised, both={"validation.tokens": 100_000},
        measured=lambda seen: [
            [value for name, value in row.items() if name.startswith("validation_loss/")] for row in seen.log
        ],
    ),
    Place("anneals", "candidates.one", LEARNED, "texts", tokenised),
    Place("anneals", "replay.data", LEARNED, "texts", tokenised,
          both={"candidates.one": "others", "measure": "corpus", "replay.share": 0.5}),
    Place("anneals", "measure", MEASURED, "others", tokenised, measured=_documents),
    Place("sft", "data", LEARNED, "answers", tokenised, column="completion"),
    Place("distill", "data", LEARNED, "answers", tokenised, column="completion"),
    Place("multimodal", "data", LEARNED, "answers", tokenised, column="completion"),
    Place("multimodal", "replay.data", LEARNED, "answers", tokenised, column="completion",
          both={"data": "others.jsonl", "replay.share": 0.5}),
    Place("sft", "replay.data", LEARNED, "answers", tokenised, column="completion",
          both={"data": "others.jsonl", "replay.share": 0.5}),
    Place("preference", "data", JUDGED, "pairs", trained, column="chosen"),
    Place("reward", "data", JUDGED, "pairs", trained, column="chosen"),
    Place("reward", "test", TESTED, "pairs", trained, column="chosen",
          measured=lambda seen: seen.summary["test"], both={"data": "more-pairs.jsonl"}),
    Place("rlvr", "data", POSED, "problems", posed, column="prompt"),
    Place("ppo", "data", POSED, "problems", posed, column="prompt"),
    Place("compare", "data", POSED, "problems", posed, column="prompt"),
    Place("label_steps", "data", POSED, "problems", solved, column="prompt"),
    Place("quantize", "data", MEASURED, "texts", tokenised, measured=lambda seen: seen.summary["tokens"]),
    Place("merge", "data", MEASURED, "texts", tokenised, measured=lambda seen: seen.summary["bits_per_byte"]),
    Place("shrink", "data", MEASURED, "texts", tokenised,
          measured=lambda seen: seen.summary["measured_tokens"]),
    Place("corpus", "data", READ, "texts", tokenised, listed=True),
    Place("synthesize", "data", READ, "problems", written, column="prompt", listed=True,
          both={"from": None, "steps": ["traces"]}),
    Place("text_to_sql", "data", READ, "questions", asked, column="question", listed=True),
]  # fmt: skip


def line(place: Place, name: str, value: Any, check: Any, before: Any, after: Any, **more: Any) -> None:
    """One line for what a place says of a source: the sources before, and after."""
    path = f"{place.setting.removesuffix('.one')}.{name}"
    LINES.append(Line(place.kind, path, value, after, {**place.both, **before}, check, **more))


def number_of(name: str) -> int:
    """The line of the file that a document was."""
    return int(name.rpartition(":")[2].partition("/")[0])


def reading(place: Place) -> None:
    """How documents are read."""
    held = {"validation": 0.5} if place.role == MEASURED else {}
    plain = place.naming(file=held)

    def texts(seen: Seen, file: str = place.file) -> Texts:
        found = place.read(seen, file)
        assert found, "no document took part"
        return found

    def limited(before: Seen, after: Seen) -> None:
        assert max(map(number_of, texts(before))) > 6 >= max(map(number_of, texts(after)))

    def renamed(before: Seen, after: Seen) -> None:
        assert not any("zz" in text for text in texts(before).values())
        assert all("zz" in text for name, text in texts(after).items() if is_read(name))

    def is_read(name: str) -> bool:
        return not name.endswith(("/prompt", "/rejected"))

    def from_test(before: Seen, after: Seen) -> None:
        assert any("train" in name for name in texts(before, "halves-"))
        assert all("test" in name for name in texts(after, "halves-"))

    if place.role == TESTED:
        limited, renamed, from_test = (_measures_another(place),) * 3
    line(place, "limit", 6, limited, plain, place.naming(file={**held, "limit": 6}))
    columns = {"columns": {place.column: "other"}}
    line(place, "columns", columns["columns"], renamed, plain, place.naming(file={**held, **columns}))
    line(
        place,
        "split",
        "test",
        from_test,
        place.naming(halves=held),
        place.naming(halves={**held, "split": "test"}),
    )
    line(place, "subset", "en", None, plain, place.naming(file={**held, "subset": "en"}),
         refused="`subset: en` names a part of a data set on the hub")  # fmt: skip
    skips = place.naming(damaged={**held, "on_bad": "skip"})
    line(
        place,
        "on_bad",
        "stop",
        None,
        skips,
        place.naming(damaged=held),
        refused=f"damaged-{place.file}.jsonl:",
    )
    # That it is skipped is seen by the run before.
    line(place, "on_bad", "skip", lambda before, after: None, plain, skips)


def _measures_another(place: Place) -> Callable[[Seen, Seen], None]:
    def check(before: Seen, after: Seen) -> None:
        assert before.losses == after.losses
        assert place.measured(before) != place.measured(after)

    return check


def separating(place: Place) -> None:
    """Where a text file is divided."""
    held = {"validation": 0.5} if place.role == MEASURED else {}
    as_text = {} if place.column in ("text", "completion") else {"columns": {place.column: "text"}}

    def divided(before: Seen, after: Seen) -> None:
        assert all("|" in text for text in place.read(before, "notes").values())
        found = place.read(after, "notes")
        assert found
        assert all("|" not in text for text in found.values())

    before, after = ({**held, **as_text, "separator": one} for one in ("\n\n", "|"))
    line(place, "separator", "|", divided, place.naming(notes=before), place.naming(notes=after))


def taking_part(place: Place) -> None:
    """How much of a source takes part in a mixture, and in what order."""

    def nothing_of_it(before: Seen, after: Seen) -> None:
        def shares(seen: Seen) -> set[bool]:
            return {"more-" in name for names in seen.ids for name in names if place.file in name}

        assert shares(before) == {False, True}
        assert shares(after) == {False}

    alike = place.naming(file={"weight": 1}, more={"weight": 1})
    line(place, "weight", 0, nothing_of_it, alike, place.naming(file={"weight": 1}, more={"weight": 0}))
    line(place, "max_repeats", 0.01, None, place.naming(file={}), place.naming(file={"max_repeats": 0.01}),
         refused="`max_repeats`")  # fmt: skip


def in_order(place: Place) -> None:
    """The rows of a pass from the lowest mean of a column to the highest."""

    def ordered(before: Seen, after: Seen) -> None:
        def means(seen: Seen) -> list[float]:
            return [
                np.average(
                    [ROWS[place.file][number_of(name) - 1]["ease"] for name in row.ids], weights=row.lengths
                )
                for rows in seen.batches
                for row in rows
                if all(name.startswith(place.file) for name in row.ids)
            ]

        assert means(before) != sorted(means(before))
        assert len(means(after)) > 2
        assert means(after) == sorted(means(after))

    half = place.naming(file={})
    ranked = place.naming(file={"easy_first": "ease"})
    line(place, "easy_first", "ease", ordered, {**half, **LONGER}, ranked)


def by_length(place: Place) -> None:
    """Which documents take part, by their tokens; and the same source under two names."""
    held = {"validation": 0.5} if place.role == MEASURED else {}

    def within(low: int, high: int) -> Callable[[Seen, Seen], None]:
        def check(before: Seen, after: Seen) -> None:
            if place.role == MEASURED:
                assert place.measured(before) != place.measured(after)
                return
            whole = place.read(after, place.file)
            lengths = {name: len(tokenizer_of(after).encode(text)) + 1 for name, text in whole.items()}
            assert not all(
                low <= lengths[name] <= high for names in before.ids for name in names if name in whole
            )
            assert all(low <= lengths[name] <= high for names in after.ids for name in names if name in whole)

        return check

    longer = LONGER if place.role == LEARNED else {}
    # Texts have 9 to 11 tokens, the others 20 to 23.
    border = 10 if place.file == "texts" else 21
    for name, check in (("min_tokens", within(border, 999)), ("max_tokens", within(0, border))):
        bounded = place.naming(file={**held, name: border})
        line(place, name, border, check, {**place.naming(file=held), **longer}, bounded)

    def read_under_another_name(before: Seen, after: Seen) -> None:
        assert place.read(after, place.file) == place.read(before, place.file)

    named = place.naming(another={**held, "of": f"{place.file}.jsonl"})
    line(place, "of", f"{place.file}.jsonl", read_under_another_name, place.naming(file=held), named)


def held_out(place: Place) -> None:
    """How many documents are not trained on."""

    def more_of_them(before: Seen, after: Seen) -> None:
        few, many = count(before), count(after)
        whole = len(ROWS[place.file])
        assert few < many < whole

    def count(seen: Seen) -> int:
        if place.role == JUDGED:
            return seen.summary["data"][f"{place.file}.jsonl"]["held_out"]
        folders = [path.parent for path in seen.folder.rglob("tokenised/*/manifest.json")]
        splits = [Shards(folder, "validation") for folder in folders]
        return sum(
            any(place.file in one.id(index) for _ in [0]) for one in splits for index in range(len(one))
        )

    low = 0.2 if place.role == MEASURED else 0.01
    line(place, "validation", 0.5, more_of_them, place.naming(file={"validation": low}),
         place.naming(file={"validation": 0.5}))  # fmt: skip


def refusing(place: Place, *names: str, words: str) -> None:
    """What a place cannot say of its sources."""
    values = {"weight": 2, "max_repeats": 2, "easy_first": "ease", "validation": 0.5, "separator": "|",
              "of": f"{place.file}.jsonl", "min_tokens": 2, "max_tokens": 99}  # fmt: skip
    for name in names:
        line(place, name, values[name], None, place.naming(file={}), place.naming(file={name: values[name]}),
             refused=words)  # fmt: skip


LENGTHS = ("of", "min_tokens", "max_tokens")
for place in PLACES:
    reading(place)
    if place.role in (LEARNED, JUDGED):
        taking_part(place)
    if place.role in (LEARNED, JUDGED, MEASURED):
        held_out(place)
    if place.role == LEARNED:
        in_order(place)
    if place.role in (JUDGED, TESTED):
        refusing(place, "easy_first", "separator", words="changes nothing here")
    if place.role in (MEASURED, TESTED, POSED):
        refusing(place, "weight", "max_repeats", words="changes nothing here")
    if place.role in (MEASURED, POSED):
        refusing(place, "easy_first", words="changes nothing here")
    if place.role in (TESTED, POSED):
        refusing(place, "validation", words="changes nothing here")
    if place.role not in (JUDGED, TESTED) and place.kind != "text_to_sql":
        separating(place)
    if place.kind in (*ANSWERS, "distill") or place.role in (JUDGED, TESTED, POSED):
        refusing(place, *LENGTHS, words="is chosen by length or stands under another name")
    elif place.role != READ:
        by_length(place)
