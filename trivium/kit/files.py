"""Files and folders that appear whole or not at all, and are checked when they are read again."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trivium.kit.errors import TriviumError

if TYPE_CHECKING:
    from torch import Tensor


BARRED = frozenset(
    {errno.EACCES, errno.EPERM, errno.EROFS, errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG}
)
"""What is wrong with a place that a person named, where the mistake cannot be one of ours."""


def expanded(name: Path | str) -> Path:
    """A path with `~` as the shell reads it: the home of a user whom nobody knows stays letters."""
    return Path(os.path.expanduser(name))


def write_bytes(path: Path | str, content: bytes) -> None:
    """Replace a file in one step: a reader sees the old content or the new, never a part."""
    path = Path(path)
    with _whole_file(path) as beside:
        beside.write_bytes(content)


def write_text(path: Path | str, text: str) -> None:
    """Replace a text file (UTF-8) in one step."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path | str, content: Any) -> None:
    """Replace a JSON file in one step; the keys keep their order."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path | str) -> Any:
    """Read a JSON file, or name it and the place where it breaks."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise TriviumError(f"{path} is missing; check the path or make it again.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise TriviumError(f"{path} is not valid JSON ({error}); it is damaged, make it again.") from None


@contextmanager
def whole_folder(path: Path | str) -> Iterator[Path]:
    """A folder to fill that takes its name only once everything in it is safely on disk."""
    path = Path(path)
    beside = _beside(path)
    try:
        with _told_of_the_disk(path):
            beside.mkdir(parents=True)
            yield beside
            for inner in sorted(beside.rglob("*"), reverse=True):
                sync(inner)
            sync(beside)
            if path.is_dir():
                # A folder cannot be renamed over a filled one, so the old one steps aside first.
                old = _beside(path)
                os.rename(path, old)
                os.rename(beside, path)
                shutil.rmtree(old)
            else:
                os.rename(beside, path)
            sync(path.parent)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise


def checksum(path: Path | str) -> str:
    """The content of a file as 32 hexadecimal characters of blake2b."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def save_tensors(
    path: Path | str, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Write tensors as one safetensors file, in one step."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    ready = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    path = Path(path)
    with _whole_file(path) as beside:
        try:
            save_file(ready, beside, metadata)
        except SafetensorError as error:
            if "os error 28" in str(error):
                raise OSError(errno.ENOSPC, "No space left on device") from error
            raise


def load_tensors(path: Path | str) -> dict[str, Tensor]:
    """Read a safetensors file, or name it as damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except FileNotFoundError:
        raise TriviumError(f"{path} is missing; check the path or make it again.") from None
    except SafetensorError as error:
        raise TriviumError(f"{path} is damaged ({error}); make or download it again.") from None


def sync(path: Path | str) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk itself."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _whole_file(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to; it takes the name of `path` when all of it is on the disk."""
    beside = _beside(path)
    try:
        with _told_of_the_disk(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield beside
            sync(beside)
            os.replace(beside, path)
            sync(path.parent)
    except BaseException:
        with suppress(OSError):
            beside.unlink()
        raise


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.part")


@contextmanager
def _told_of_the_disk(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise TriviumError(
                f"The disk is full: {path} could not be written; free some space and run the same command"
                " again, nothing that was there before is lost."
            ) from error
        if error.errno in BARRED:
            raise TriviumError(
                f"{path} cannot be written: {error.strerror}; mend that or name another place."
            ) from error
        raise
