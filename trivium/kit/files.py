"""Files and folders that appear whole or not at all, and are checked when they are read again."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trivium.kit.errors import DamagedError, TriviumError

if TYPE_CHECKING:
    from torch import Tensor


BARRED = frozenset(
    {errno.EACCES, errno.EPERM, errno.EROFS, errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG}
)
"""What is wrong with a place that a person named, where the mistake cannot be one of ours."""
FAILING = frozenset({errno.EIO, errno.ESTALE, errno.ENXIO, errno.ENODEV, errno.ETIMEDOUT, errno.ENOTCONN})
"""What a disk or a network file system answers that has failed or gone away for a while."""
CHECKSUM = "checksum"
"""The key of a safetensors file's metadata under which the checksum of its tensors stands."""


def expanded(name: Path | str) -> Path:
    """A path with `~` as the shell reads it: the home of an unknown user stays letters."""
    return Path(os.path.expanduser(name))


def write_bytes(path: Path | str, content: bytes) -> None:
    """Replace a file in one step: a reader sees the old content or the new, never a part."""
    path = Path(path)
    with whole_file(path) as part:
        part.write_bytes(content)


def write_text(path: Path | str, text: str) -> None:
    """Replace a text file (UTF-8) in one step."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path | str, content: Any) -> None:
    """Replace a JSON file in one step; the keys keep their order."""
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    try:
        write_text(path, text)
    except UnicodeEncodeError:
        # Half a surrogate pair has no bytes in UTF-8, but JSON can escape it.
        write_text(path, json.dumps(content, indent=2) + "\n")


def read_json(path: Path | str) -> Any:
    """Read a JSON file, or name it and the place where it breaks; a key written twice is a fault."""
    with readable(path):
        try:
            text = Path(path).read_text(encoding="utf-8")
            return json.loads(text, object_pairs_hook=without_duplicates)
        except RecursionError:
            raise DamagedError(f"{path} is nested too deeply to be read; make it again.") from None
        except ValueError as error:
            raise DamagedError(f"{path} is not valid JSON ({error}); it is damaged, make it again.") from None


def read_object(path: Path | str) -> dict[str, Any]:
    """Read a JSON file that has to hold an object."""
    content = read_json(path)
    if not isinstance(content, dict):
        raise DamagedError(f"{path} holds a {type(content).__name__} where an object belongs; make it again.")
    return content


def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of a JSON text, for `object_pairs_hook`; a key written twice is a ValueError."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} is written twice")
    return found


def bare_name(path: Path | str, name: Any) -> str:
    """The name of a file that `path` says lies beside it: a bare name, which leads to no other folder."""
    if not isinstance(name, str) or name in ("", ".", "..") or {"/", "\\", "\0"} & set(name):
        raise DamagedError(
            f"{path} names {name!r}, which is no file in its folder; make or download it again."
        )
    return name


@contextmanager
def readable(path: Path | str) -> Iterator[None]:
    """Name a file that is missing or that the disk does not give."""
    try:
        yield
    except FileNotFoundError:
        raise TriviumError(f"{path} is missing; check the path or make it again.") from None
    except OSError as error:
        raise TriviumError(
            f"{path} cannot be read: {error.strerror or error}; see to the disk or name another place."
        ) from error


@contextmanager
def whole_folder(path: Path | str, begun: Path | None = None) -> Iterator[Path]:
    """A folder to fill that takes its name only once everything in it is safely on disk.

    `begun` is a folder that others have filled in part, under a name of `part_of`.
    """
    path = Path(path)
    beside = begun or _beside(path)
    try:
        with _told_of_the_disk(path):
            make_folder(path.parent)
            beside.mkdir(exist_ok=begun is not None)
            yield beside
            for inner in sorted(beside.rglob("*"), reverse=True):
                sync(inner)
            sync(beside)
            if path.is_dir() and _exchange(beside, path):
                old = beside
            elif path.is_dir():
                # A folder cannot be renamed over a filled one, so the old one steps aside first.
                old = _beside(path)
                os.rename(path, old)
                os.rename(beside, path)
            else:
                old = None
                os.rename(beside, path)
            sync(path.parent)
            if old is not None:
                shutil.rmtree(old)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise


def checksum(path: Path | str) -> str:
    """The content of a file as 32 hexadecimal characters of blake2b."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def save_tensors(path: Path | str, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> str:
    """Write tensors and their checksum, which is returned, as one safetensors file, in one step.

    Equal tensors and metadata give equal bytes.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    ready = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    found = tensors_checksum((name, ready[name]) for name in sorted(ready))
    path = Path(path)
    with whole_file(path) as beside:
        # The library makes its files unreadable to other people; this one is as open as any new file.
        beside.touch()
        mode = beside.stat().st_mode
        try:
            save_file(ready, beside, {"format": "pt", **(metadata or {}), CHECKSUM: found})
        except SafetensorError as error:
            if "os error 28" in str(error):
                raise OSError(errno.ENOSPC, "No space left on device") from error
            raise
        beside.chmod(mode)
        _sort_metadata(beside)
    return found


def _sort_metadata(path: Path) -> None:
    """Bring the metadata of a safetensors file into order, which the library leaves to chance."""
    with open(path, "r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        assert len(text) <= size, "the same header in another order is as long"
        file.seek(8)
        file.write(text.ljust(size))


def load_tensors(path: Path | str, expected: str | None = None) -> dict[str, Tensor]:
    """Read a safetensors file that has this checksum, else the one in its metadata, or name it as damaged."""
    with opened_tensors(path) as file:
        expected = expected or (file.metadata() or {}).get(CHECKSUM)
        tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
    if expected is not None and tensors_checksum(tensors.items()) != expected:
        raise DamagedError(f"{path} is damaged: its checksum differs; make or download it again.")
    return tensors


@contextmanager
def opened_tensors(path: Path | str) -> Iterator[Any]:
    """A safetensors file whose tensors are read one by one, or it is named as damaged."""
    from safetensors import SafetensorError, safe_open

    with readable(path):
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                yield file
        except SafetensorError as error:
            raise DamagedError(f"{path} is damaged ({error}); make or download it again.") from None


def tensors_checksum(named: Iterable[tuple[str, Tensor]]) -> str:
    """A digest of names, types, shapes and bytes, in the order given."""
    import torch

    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in named:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def make_folder(path: Path | str) -> None:
    """Make a folder and those above it; each new one's name is on the disk itself."""
    path = Path(path)
    if path.is_dir():
        return
    make_folder(path.parent)
    path.mkdir(exist_ok=True)
    sync(path.parent)


def part_of(path: Path) -> Path:
    """The name of a folder while several processes fill it, alike in all of them."""
    return path.with_name(f".{path.name}.part")


def remove_parts(folder: Path) -> None:
    """Remove what a process that was killed while it wrote left half-done in a folder."""
    for part in folder.glob(".*.part"):
        if part.is_dir() and not part.is_symlink():
            shutil.rmtree(part, ignore_errors=True)
        else:
            part.unlink(missing_ok=True)


def sync(path: Path | str) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk itself."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to; it takes the name of `path` when all of it is on the disk."""
    beside = _beside(path)
    try:
        with _told_of_the_disk(path):
            make_folder(path.parent)
            yield beside
            sync(beside)
            os.replace(beside, path)
            sync(path.parent)
    except BaseException:
        with suppress(OSError):
            beside.unlink()
        raise


def _exchange(first: Path, second: Path) -> bool:
    """Swap two names in one step; False where the system or the file system cannot."""
    swap = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if swap is None:
        return False
    here, exchange = -100, 2
    if swap(here, os.fsencode(first), here, os.fsencode(second), exchange) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
        return False
    raise OSError(number, os.strerror(number), str(second))


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
                f"{path} cannot be written: {error.strerror}; fix that or name another place."
            ) from error
        if error.errno in FAILING:
            raise TriviumError(
                f"{path} could not be written: {error.strerror}; see to the disk or the network, then run the"
                " same command again, nothing that was there before is lost."
            ) from error
        raise
