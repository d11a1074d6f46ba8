"""Curation as a whole: every document is kept or dropped for a reason, also when killed, in parts."""

from __future__ import annotations

import gzip
import json
import multiprocessing
import os
import signal
import time
from itertools import pairwise
from pathlib import Path

import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest
from curating import curated, curation, rows, write_lines

import trivium
from trivium.curate.step import Step, parse_steps
from trivium.data.sources import Source
from trivium.kit.errors import TriviumError
from trivium.recipe.outside import Checksums, content_fingerprint

STEPS = [
    "repair",
    {"language": {"keep": ["en"]}},
    {"deduplicate": "exact"},
    {"deduplicate": {"method": "lines", "most": 5}},
    {"deduplicate": {"method": "minhash", "threshold": 0.55, "bands": 28, "rows": 4, "shingle": 2}},
    "mask",
    {"decontaminate": {"against": ["world:facts?limit=100"]}},
    {"sample": {"share": 0.9}},
]
WEB = Source(path="world:web", limit=400)
SMALL = 1 << 13
"""Shards of eight thousand bytes, so that a small corpus has many."""


def content(folder: Path) -> dict[str, bytes]:
    """The bytes of everything a curation leaves."""
    files = [*folder.glob("data/*"), *folder.glob("dropped/*"), folder / "funnel.json"]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    curation(folder, [WEB], STEPS, shard_bytes=SMALL).run()
    return folder


def test_every_document_is_kept_or_dropped_for_a_reason(whole: Path) -> None:
    kept, dropped = rows(whole / "data"), rows(whole / "dropped")
    assert sorted(row["id"] for row in kept + dropped) == sorted(f"world:web#{n}" for n in range(400))
    assert all(row["reason"] and row["step"] and row["text"] for row in dropped)
    assert {"id", "source", "line", "text", "language", "language_score", "copies"} <= kept[0].keys()
    assert [row["line"] for row in kept] == [int(row["id"].partition("#")[2]) for row in kept]
    funnel = json.loads((whole / "funnel.json").read_text())
    steps = funnel["steps"]
    for before, after in pairwise(steps):
        assert before["sources"]["world:web"][2:] == after["sources"]["world:web"][:2] or after["key"] == "01"
    for step in steps:
        given, _, left, _ = step["sources"]["world:web"]
        assert given - left == sum(step["rules"].values())
        assert all(
            len(examples) == min(20, step["rules"][rule]) for rule, examples in step["examples"].items()
        )
    assert steps[-1]["sources"]["world:web"][2] == len(kept) == funnel["documents"]


def until_the_end(folder: str) -> None:
    curation(Path(folder), [WEB], STEPS, shard_bytes=SMALL).run()


@pytest.mark.slow
def test_killed_again_and_again_it_ends_with_the_same_bytes(whole: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    kills, seen = 0, 0
    while True:
        process = context.Process(target=until_the_end, args=(str(tmp_path),))
        process.start()
        # Wait for some more shards than there were, in whatever pass, and kill.
        while process.is_alive() and len(list(tmp_path.glob("checkpoints/*/*.json"))) < seen + 9:
            time.sleep(0.001)
        if process.is_alive():
            os.kill(process.pid or 0, signal.SIGKILL)
            kills += 1
        process.join()
        seen = len(list(tmp_path.glob("checkpoints/*/*.json")))
        if process.exitcode == 0:
            break
    assert kills >= 4
    assert content(tmp_path) == content(whole)


@pytest.mark.slow
def test_more_processes_write_the_same_bytes(whole: Path, tmp_path: Path) -> None:
    curation(tmp_path, [WEB], STEPS, shard_bytes=SMALL, workers=2).run()
    assert content(tmp_path) == content(whole)


def test_a_shard_that_is_whole_is_not_worked_on_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    curation(tmp_path, [WEB], STEPS[:3], shard_bytes=SMALL).run()
    (tmp_path / "funnel.json").unlink()
    from trivium.curate import curation as module

    monkeypatch.setattr(module, "run_shard", None)
    with pytest.raises(TypeError):
        curation(tmp_path / "new", [WEB], STEPS[:3], shard_bytes=SMALL).run()
    last = sorted((tmp_path / "checkpoints").glob("pass-*"))[-1]
    assert (last / "DONE.json").is_file()
    curation(tmp_path, [WEB], STEPS[:3], shard_bytes=SMALL).run()
    assert (tmp_path / "funnel.json").is_file()


def test_size_of_shards_does_not_change_what_is_kept(whole: Path, tmp_path: Path) -> None:
    kept, dropped = curated(tmp_path, [WEB], STEPS)
    assert kept == rows(whole / "data")
    assert sorted(dropped, key=lambda row: row["id"]) == sorted(
        rows(whole / "dropped"), key=lambda row: row["id"]
    )


RECIPE = """
name: curated
seed: 1
stages:
  web:
    kind: curate
    data: [./raw.jsonl, {path: world:web, limit: 60}]
    steps: [repair, {deduplicate: exact}, {decontaminate: {against: [./exam.jsonl]}}]
  words: {kind: tokenizer, data: web, vocabulary: 300}
  corpus: {kind: corpus, data: web, tokenizer: words, columns: [copies]}
  base:
    kind: pretrain
    data: corpus
    model: {depth: 1, width: 32, head_width: 16, heads: 2, inner_width: 32}
    context: 64
    batch: 256
    steps: 2
"""


def test_a_recipe_learns_from_what_was_curated_under_the_same_ids(tmp_path: Path) -> None:
    write_lines(
        tmp_path / "raw.jsonl", ["one fine text", "one fine text", "capital of Peru is Lima they say", "b"]
    )
    rows_of = [{"question": "capital of Peru is Lima they", "answer": "say"}]
    write_lines(tmp_path / "exam.jsonl", rows_of)
    (tmp_path / "r.yaml").write_text(RECIPE)
    run = trivium.run(tmp_path / "r.yaml", runs=tmp_path / "runs")
    folder = tmp_path / "runs" / "curated" / "web"
    kept, dropped = rows(folder / "data"), rows(folder / "dropped")
    mine = [row for row in kept if row["source"] == "./raw.jsonl"]
    assert [(row["id"], row["line"], row["copies"]) for row in mine] == [
        ("raw.jsonl:1", 1, 2),
        ("raw.jsonl:4", 4, 1),
    ]
    gone = {row["id"]: (row["step"], row["reason"].partition(":")[0]) for row in dropped}
    assert gone["raw.jsonl:2"] == ("deduplicate exact", "copy")
    assert gone["raw.jsonl:3"] == ("decontaminate", "leak")
    from trivium.data.shards import Shards

    shards = Shards(run["corpus"].folder / "data", "train")
    assert {shards.id(index) for index in range(len(shards))} <= {row["id"] for row in kept}
    assert not (folder / "checkpoints").exists()
    again = trivium.run(tmp_path / "r.yaml", runs=tmp_path / "runs")
    assert again["web"].folder == run["web"].folder


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        ([], "`steps` is a list"),
        (["repiar"], "did you mean `repair`?"),
        ([{"filters": "goffer"}], "there is no preset `goffer`; there are gopher, c4, fineweb, code"),
        ([{"filters": {"preset": "gopher", "rules": {"word": 3}}}], "`gopher` has no rule `word`"),
        ([{"filters": {"preset": "c4", "rules": {"sentences": "many"}}}], "takes a value like 5"),
        ([{"deduplicate": "fuzzy"}], "methods are exact, minhash, lines, substrings"),
        ([{"deduplicate": {"method": "exact", "bands": 3}}], "`deduplicate` has no setting `bands`"),
        ([{"language": {"kep": ["en"]}}], "did you mean `keep`?"),
        ([{"sample": {}}], "say `share`, `documents` or `domain_cap`"),
        (["repair", "extract"], "it has to be the first step"),
        ([{"repair": {}, "mask": {}}], "one name with its settings"),
        ([{"decontaminate": {"against": []}}], "`decontaminate"),
    ],
)
def test_a_wrong_step_is_named(steps: list, words: str) -> None:
    with pytest.raises(ValueError, match=r"step") as error:
        parse_steps(steps)
    assert words in str(error.value)


def test_steps_are_written_out_and_read_again() -> None:
    steps = parse_steps(STEPS)
    assert [step.written() for step in parse_steps([step.written() for step in steps])] == [
        step.written() for step in steps
    ]
    assert {"repair", "language", "filters", "deduplicate", "mask", "decontaminate", "sample"} <= set(
        Step.all()
    )


def test_a_source_that_loses_too_much_stops_with_the_numbers(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [f"text {number % 20}" for number in range(200)])
    with pytest.raises(TriviumError, match=r"a.jsonl loses 90.0 % of its 200 documents.*exact: copy 180"):
        curated(tmp_path / "out", [path], [{"deduplicate": "exact"}], most_lost=0.5)
    # What was made is not lost: with another bound the work goes on from there.
    kept, _ = curated(tmp_path / "out", [path], [{"deduplicate": "exact"}], most_lost=0.95)
    assert len(kept) == 20


def test_nothing_left_is_one_sentence(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", ["short"])
    with pytest.raises(TriviumError, match=r"No document is left .*gopher: few words 1"):
        curated(tmp_path / "out", [path], [{"filters": "gopher"}])


def test_bad_input_is_a_counted_reject_and_the_rest_is_kept(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    write_lines(raw / "good.jsonl", ["a good text", {"text": "another", "url": "https://a.example/x"}])
    (raw / "bad.jsonl").write_text(
        '{"text": "kept"}\n{"text": 3}\nnot json\n{"other": "x"}\n{"text": "\\ud800"}\n{"text": " "}\n'
    )
    whole = gzip.compress(b'{"text": "before the cut"}\n' + os.urandom(60_000).hex().encode())
    (raw / "cut.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    (raw / "bomb.jsonl.gz").write_bytes(gzip.compress(b'{"text": "' + b"a" * (1 << 27) + b'"}', 9))
    (raw / "empty.jsonl").write_bytes(b"")
    (raw / "empty.parquet").write_bytes(b"")
    parquet.write_table(arrow.table({"content": ["no text column"]}), raw / "wrong.parquet")
    os.mkfifo(raw / "pipe.jsonl")
    # A recipe looks for pictures in files before it runs; what is wrong with them is said when they are read.
    assert content_fingerprint("raw", tmp_path, Checksums())
    kept, dropped = curated(tmp_path / "out", [str(raw)], ["repair"])
    assert sorted(row["text"] for row in kept) == ["a good text", "another", "before the cut", "kept"]
    said = {row["id"].removeprefix("raw/"): row["reason"] for row in dropped}
    assert set(said) == {
        "bad.jsonl:2", "bad.jsonl:3", "bad.jsonl:4", "bad.jsonl:5", "bad.jsonl:6", "cut.jsonl.gz",
        "bomb.jsonl.gz:1", "bomb.jsonl.gz", "empty.parquet", "wrong.parquet:1",
    } - (set() if "bomb.jsonl.gz:1" in said else {"bomb.jsonl.gz:1"})  # fmt: skip
    assert "damaged or cut off" in said["cut.jsonl.gz"]
    assert "100 times its size" in said["bomb.jsonl.gz"]
    assert "columns are content; map one with `columns`" in said["wrong.parquet:1"]
    assert {row["step"] for row in dropped} == {"read"}


def test_one_text_as_long_as_a_corpus_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trivium.curate.read._PAGE", 1 << 20)
    for name, size in (("good.txt", 1 << 10), ("fits.txt", 1 << 20), ("long.txt", (1 << 20) + 1)):
        (tmp_path / name).write_text("a" * size)
    for steps in (["repair"], ["extract", "repair"]):
        kept, dropped = curated(tmp_path / "-".join(steps), [str(tmp_path / "*.txt")], steps)
        assert [len(row["text"]) for row in kept] == [1 << 20, 1 << 10]
        assert [row["reason"].partition(";")[0] for row in dropped] == [
            "unreadable: is one text of more than 1 MiB"
        ]


def test_a_file_that_changes_while_it_is_read_is_named(tmp_path: Path) -> None:
    path = Path(write_lines(tmp_path / "a.jsonl", [f"text {number}" for number in range(50)]))
    from trivium.curate.read import read_shards

    shards = read_shards([("a", Source(path=str(path)))], False, 100)
    next(shards)
    with path.open("a") as file:
        file.write('{"text": "more"}\n')
    with pytest.raises(TriviumError, match="changed while it was read"):
        list(shards)


def test_a_pipe_is_one_sentence(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "p.jsonl")
    with pytest.raises(TriviumError, match="There is no file"):
        curated(tmp_path / "out", [str(tmp_path / "p.jsonl")], ["repair"])


def test_files_behind_a_url_are_read(tmp_path: Path) -> None:
    import fsspec

    system = fsspec.filesystem("memory")
    with system.open("/bucket/part-1.jsonl", "wb") as file:
        file.write(b'{"text": "from far"}\n')
    with system.open("/bucket/part-2.txt", "wb") as file:
        file.write(b"a note")
    kept, _ = curated(tmp_path, ["memory://bucket"], ["repair"])
    assert [row["text"] for row in kept] == ["from far", "a note"]
    assert kept[0]["id"].endswith("bucket/part-1.jsonl:1")


def test_two_sources_with_files_of_one_name_have_different_ids(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write_lines(tmp_path / name / "a.jsonl", [f"text {name}"])
    kept, _ = curated(tmp_path / "out", [str(tmp_path / n / "a.jsonl") for n in ("one", "two")], ["repair"])
    assert len({row["id"] for row in kept}) == 2
