"""Patterns find what Python's glob finds, and a search through a whole disk is refused."""

from __future__ import annotations

import glob
import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trivium.data.sources import Source, read_documents
from trivium.kit import listing
from trivium.kit.errors import TriviumError
from trivium.kit.listing import files_below, matching
from trivium.pipeline.run import prepare
from trivium.recipe.outside import Checksums, content_fingerprint

NAMES = st.sampled_from(["a", "b", "ab", ".h", "a.txt", "b.txt", "[a]"])
PARTS = st.sampled_from(["*", "**", "a", "a*", "?", "*.txt", ".*", "[ab]", "[!a]*", ".h", "[[]a]"])


@given(
    trees=st.lists(st.lists(NAMES, min_size=1, max_size=4), max_size=8),
    pattern=st.lists(PARTS, min_size=1, max_size=4),
)
@settings(deadline=None, max_examples=200)
def test_a_pattern_finds_what_glob_finds(trees: list[list[str]], pattern: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for *above, name in trees:
            place = Path(folder, *above)
            try:
                place.mkdir(parents=True, exist_ok=True)
                (place / name).touch()
            except (FileExistsError, NotADirectoryError, IsADirectoryError):
                continue
        wanted = os.path.join(folder, *pattern)
        # Of a folder that is not there, glob finds that it holds itself.
        expected = {Path(one) for one in glob.glob(wanted, recursive=True) if os.path.lexists(one)}
        found = list(matching(wanted))
        assert set(found) == expected
        assert len(found) == len(expected)


def test_a_relative_pattern_is_looked_for_from_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b.txt").touch()
    monkeypatch.chdir(tmp_path)
    assert list(matching("*/*.txt")) == [Path("a/b.txt")]
    assert sorted(matching("**")) == sorted(map(Path, glob.glob("**", recursive=True)))


def test_what_cannot_be_looked_at_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").symlink_to("b" * 300)
    with pytest.raises(TriviumError, match=r"a\.txt cannot be read: File name too long"):
        list(files_below(tmp_path))
    with pytest.raises(TriviumError, match=r"/proc/self/mem cannot be read: "):
        content_fingerprint("/proc/self/mem", tmp_path, Checksums())


def test_links_that_lead_in_a_circle_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in "abc":
        (tmp_path / name).symlink_to(tmp_path)
    (tmp_path / "d.txt").write_text("text")
    monkeypatch.setattr(listing, "MOST_LISTED", 10_000)
    with pytest.raises(TriviumError, match="goes through more than 10,000 files"):
        list(matching(tmp_path / "**" / "*.txt"))
    assert list(files_below(tmp_path)) == [tmp_path / "d.txt"]


@pytest.mark.parametrize("data", ["./many/**/*.jsonl", "./many/*", "./many"])
def test_a_plan_over_a_whole_disk_is_refused(
    data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It went on for as long as there were files."""
    for folder in range(20):
        (tmp_path / "many" / str(folder)).mkdir(parents=True)
        for number in range(20):
            (tmp_path / "many" / str(folder) / f"{number}.txt").write_text("a")
            (tmp_path / "many" / f"{folder}-{number}.txt").write_text("a")
    (tmp_path / "r.yaml").write_text(
        f"stages: {{words: {{kind: tokenizer, data: '{data}', vocabulary: 300}}}}"
    )
    prepare(tmp_path / "r.yaml", tmp_path / "runs") if "jsonl" not in data else None
    monkeypatch.setattr(listing, "MOST_LISTED", 300)
    with pytest.raises(TriviumError, match="goes through more than 300 files; name a folder nearer to them"):
        prepare(tmp_path / "r.yaml", tmp_path / "runs")
    with pytest.raises(TriviumError, match="goes through more than 300 files"):
        list(read_documents(Source(path=str(tmp_path / data))))
