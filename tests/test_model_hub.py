"""Where a model's files are; nothing here touches the network."""

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from trivium.kit.errors import TriviumError
from trivium.model.hub import resolve


def test_a_folder_is_itself(tmp_path):
    assert resolve(tmp_path) == tmp_path
    assert resolve(str(tmp_path)) == tmp_path


def test_the_folder_of_a_stage_is_the_model_it_made(tmp_path):
    (tmp_path / "model").mkdir()
    assert resolve(tmp_path) == tmp_path
    (tmp_path / "model" / "config.json").write_text("{}")
    assert resolve(tmp_path) == tmp_path / "model"
    (tmp_path / "config.json").write_text("{}")
    assert resolve(tmp_path) == tmp_path


def test_an_id_is_fetched_with_its_revision(tmp_path, monkeypatch):
    asked = {}

    def fetch(repository, revision, allow_patterns, local_files_only):
        assert not local_files_only
        asked.update(repository=repository, revision=revision, patterns=allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert resolve("owner/name@v1.0") == tmp_path
    assert (asked["repository"], asked["revision"]) == ("owner/name", "v1.0")
    assert not any("bin" in pattern or "pt" in pattern for pattern in asked["patterns"]), (
        "no pickle is fetched"
    )
    resolve("owner/name")
    assert asked["revision"] is None


def test_what_is_neither_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(TriviumError, match="is a file"):
        resolve(tmp_path / "file")
    with pytest.raises(TriviumError, match="neither a folder nor an id"):
        resolve("no/such/folder/here")

    def fail(*arguments, **options):
        raise LocalEntryNotFoundError("no connection")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(
        TriviumError, match=r"owner/name is no folder here and could not be fetched.*no connection"
    ):
        resolve("owner/name")
