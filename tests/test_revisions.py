"""Data of the hub is read at one commit, which the fingerprint counts, whatever its name leads to later."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from fake_hub import COMMITS

from trivium.pipeline.run import Run, prepare, run
from trivium.recipe.graph import build
from trivium.recipe.revisions import Revisions
from trivium.recipe.schema import load

TESTS = Path(__file__).parent
FIRST, SECOND = COMMITS
RECIPE = """\
name: hub
stages:
  words: {kind: tokenizer, data: DATA, vocabulary: 272}
  corpus: {kind: corpus, data: DATA, tokenizer: words}
"""


def write(folder: Path, name: str, data: str = "owner/name") -> Path:
    path = folder / name
    path.write_text(RECIPE.replace("DATA", data))
    return path


@pytest.mark.slow
def test_a_repository_that_moves_on_is_read_where_it_was(tmp_path):
    """In a process of its own: the libraries find the hub's address when they are imported."""
    head = tmp_path / "head"
    head.write_text(FIRST)
    hub = subprocess.Popen(
        [sys.executable, str(TESTS / "fake_hub.py"), str(head)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert hub.stdout is not None
        address = f"http://127.0.0.1:{hub.stdout.readline().strip()}"
        environment = {
            **os.environ, "HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home"),
            "PYTHONPATH": str(TESTS), "HF_HUB_DISABLE_TELEMETRY": "1",
        }  # fmt: skip
        code = f"import test_revisions; test_revisions.on_a_hub({str(tmp_path)!r})"
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr[-3000:]
    finally:
        hub.kill()
        hub.wait()


def on_a_hub(folder: str) -> None:
    """The first commit is pinned; the second is another result; machines with a store read the first."""
    place = Path(folder)
    path, url = write(place, "hub.yaml"), f"file://{place / 'shared'}"
    first = run(path, place / "here", store=url)
    assert texts(first) == {"first 0", "first 1", "first 2", "first 3"}
    read = first.entry("words").record["outside"]
    assert read == {"owner/name": f"owner/name@{FIRST}"}, read
    (place / "head").write_text(SECOND)
    again = run(path, place / "here")
    assert set(again.became.values()) == {"reused"}
    moved = run(path, place / "there")
    assert texts(moved) == {"second 0", "second 1", "second 2", "second 3"}
    assert moved.nodes["words"].fingerprint != first.nodes["words"].fingerprint
    agreed = run(path, place / "third", store=url)
    assert set(agreed.became.values()) == {"pulled"}
    assert agreed.nodes["words"].fingerprint == first.nodes["words"].fingerprint
    written = prepare(write(place, "said.yaml", f"owner/name@{SECOND}"), place / "here")
    assert written.nodes["words"].fingerprint == moved.nodes["words"].fingerprint


def texts(prepared: Run) -> set[str]:
    from trivium.data.shards import Shards
    from trivium.tokens.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(prepared.entry("words").output)
    shards = Shards(prepared.entry("corpus").output, "train", tokenizer=tokenizer)
    ids = [token for number in range(len(shards)) for token in shards.document(number).tolist()]
    text = tokenizer.decode(ids)
    return {
        f"{word} {number}" for word in COMMITS.values() for number in range(4) if f"{word} {number}" in text
    }


def test_without_a_network_what_this_machine_read_last_is_pinned(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    path, refs = write(tmp_path, "hub.yaml"), tmp_path / "hub" / "datasets--owner--name" / "refs"
    unknown = prepare(path, tmp_path / "runs").nodes["words"]
    assert unknown.pinned == {}
    refs.mkdir(parents=True)
    (refs / "main").write_text(FIRST)
    known = prepare(path, tmp_path / "runs").nodes["words"]
    assert known.pinned == {"owner/name": f"owner/name@{FIRST}"}
    assert known.fingerprint != unknown.fingerprint
    (refs / "main").write_text(SECOND)
    assert prepare(path, tmp_path / "runs").nodes["words"].fingerprint == known.fingerprint
    assert prepare(path, tmp_path / "other").nodes["words"].pinned == {"owner/name": f"owner/name@{SECOND}"}


def test_a_hub_whose_name_does_not_resolve_is_no_error_of_a_plan(monkeypatch):
    """The HTTP library of the hub's client raises an error of its own, which is no OSError."""
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError

    def unknown(*_, **__):
        raise next(one for one in HfHubHTTPError.__bases__ if one is not OSError)("Name or service not known")

    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", unknown)
    assert Revisions().pinned("nobody/nothing", "model") is None


def test_a_model_of_the_hub_is_pinned_and_a_written_commit_needs_no_look_up(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    refs = tmp_path / "hub" / "models--owner--model" / "refs"
    refs.mkdir(parents=True)
    (refs / "main").write_text(FIRST)
    recipe = {"name": "hub", "stages": {"grown": {"kind": "grow", "from": "owner/model", "layers": 4}}}
    (tmp_path / "model.yaml").write_text(yaml.safe_dump(recipe))
    node = build(load(tmp_path / "model.yaml"))["grown"]
    assert node.pinned == {"owner/model": f"owner/model@{FIRST}"}
    assert Revisions().pinned(f"owner/other@{SECOND}", "model") == f"owner/other@{SECOND}"
    (refs / "main").write_text("../../etc/passwd")
    assert Revisions().pinned("owner/model", "model") is None


def test_letters_that_no_id_of_the_hub_has_are_no_error_of_a_plan():
    assert Revisions().pinned("['owner/name', {", "model") is None
