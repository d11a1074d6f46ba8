"""Which commit of a hub repository a recipe reads: found once, remembered, and part of the fingerprint.

A repository of the hub changes under its name. The first time a recipe names one, its present commit is
looked up and kept in `runs/store/revisions.json`; from then on the same commit is read, until a person
removes the line or writes another `owner/name@revision`. Machines that share a store agree on the first one
that was found.
"""

import json
import re
from pathlib import Path
from typing import Literal

from trivium.kit.errors import DamagedError
from trivium.kit.files import read_object, write_json
from trivium.kit.places import Place

Kind = Literal["model", "dataset"]
COMMIT = re.compile(r"[0-9a-f]{40}")
SECONDS = 10.0


class Revisions:
    """The commits of hub repositories, as this folder of results reads them."""

    def __init__(self, path: Path | None = None, shared: Place | None = None) -> None:
        self._path, self._shared = path, shared
        self._known: dict[str, str] = {}
        self._asked: set[str] = set()
        if path is not None and path.is_file():
            try:
                self._known = {key: commit for key, commit in read_object(path).items() if _is_commit(commit)}
            except DamagedError:
                # Found again, and then told apart by the fingerprint.
                self._known = {}

    def pinned(self, name: str, kind: Kind) -> str | None:
        """`owner/name@commit` for `owner/name` or `owner/name@revision`; None where it cannot be found."""
        repository, _, revision = name.partition("@")
        if _is_commit(revision):
            return name
        key = f"{kind}s/{name}"
        commit = self._known.get(key) or self._look_up(key, repository, revision, kind)
        if self._shared is not None:
            commit = self._agreed(key, commit)
        if commit is None:
            return None
        self._keep(key, commit)
        return f"{repository}@{commit}"

    def _look_up(self, key: str, repository: str, revision: str, kind: Kind) -> str | None:
        if key in self._asked:
            return None
        self._asked.add(key)
        return _on_the_hub(repository, revision, kind) or _in_the_cache(repository, revision, kind)

    def _agreed(self, key: str, commit: str | None) -> str | None:
        """The commit that the machines of a shared store read: the first that one of them found."""
        assert self._shared is not None
        name = f"revisions/{key.replace('@', '/at/')}/COMMIT"
        if commit is not None:
            self._shared.create(name, json.dumps(commit).encode())
        try:
            found = json.loads(self._shared.read(name) or b"null")
        except ValueError:
            found = None
        return found if _is_commit(found) else commit

    def _keep(self, key: str, commit: str) -> None:
        if self._known.get(key) != commit:
            self._known[key] = commit
            if self._path is not None:
                write_json(self._path, dict(sorted(self._known.items())))


def _is_commit(found: object) -> bool:
    return isinstance(found, str) and COMMIT.fullmatch(found) is not None


def _on_the_hub(repository: str, revision: str, kind: Kind) -> str | None:
    """The commit behind a branch or a tag; None where the hub does not answer or does not know it."""
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    ask = huggingface_hub.HfApi().repo_info
    # Those of whatever HTTP library the hub's client uses: a name that does not resolve is an error of that
    # library alone. What cannot be read is said when the stage reads it.
    unreachable: list[type[Exception]] = [OSError, HFValidationError]
    unreachable += [one for one in HfHubHTTPError.__bases__ if issubclass(one, Exception)]
    try:
        return ask(repository, revision=revision or None, repo_type=kind, timeout=SECONDS).sha
    except tuple(unreachable):
        return None


def _in_the_cache(repository: str, revision: str, kind: Kind) -> str | None:
    """The commit that this machine read last under that name."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    try:
        # An id with letters that none on the hub has is a ValueError, too.
        folder = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repository, repo_type=kind)
        found = (folder / "refs" / (revision or "main")).read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return None
    return found if _is_commit(found) else None
