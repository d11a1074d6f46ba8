"""Places that hold named objects whole: a folder, a bucket (`s3://`, `gs://`), another machine (`ssh://`).

An object is written in one step, and `create` writes only what is not there yet: of several machines that
create one name, exactly one succeeds. On S3 and GCS the store itself sees to that (`If-None-Match: *`,
`ifGenerationMatch=0`); on a file system a name is given by `link`, over ssh by a `rename` that does not
replace. Everything that machines agree on through a place rests on this one operation.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

from trivium.kit.errors import TriviumError
from trivium.kit.files import expanded, make_folder, sync, write_bytes

SCHEMES = ("file", "s3", "gs", "ssh")
NEEDS = {"s3": "s3fs", "gs": "gcsfs", "ssh": "paramiko"}


class Place(Protocol):
    """Named objects; a name is a relative path with forward slashes."""

    url: str

    def read(self, name: str) -> bytes | None:
        """The content of an object, or None where there is none."""

    def size(self, name: str) -> int | None:
        """The bytes of an object, or None where there is none."""

    def write(self, name: str, content: bytes) -> None:
        """Write an object in one step, over an earlier one."""

    def create(self, name: str, content: bytes) -> bool:
        """Write an object unless one of that name is there; says whether this call wrote it."""

    def names(self, folder: str) -> list[str]:
        """The names of the objects directly in a folder, without it, sorted."""

    def remove(self, name: str) -> None:
        """Remove an object, if it is there."""


def place_at(url: str | Path) -> Place:
    """The place that a person named: `file://`, `s3://`, `gs://`, `ssh://`, or a plain folder."""
    scheme, separator, rest = str(url).partition("://")
    if not separator or scheme == "file":
        return Folder(expanded(rest if separator else str(url)))
    if scheme not in SCHEMES:
        known = ", ".join(f"{one}://" for one in SCHEMES)
        raise TriviumError(f"{url}: `{scheme}://` is no place for a store; name one of {known}.")
    try:
        return Remote(str(url), scheme)
    except ImportError as error:
        raise TriviumError(
            f"{url} needs {NEEDS[scheme]} ({error}); install it with: pip install 'trivium[store]'."
        ) from None


class Folder:
    """A place in a file system of this machine, which other machines may have mounted, too."""

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        self.url = f"file://{self.path}"

    def read(self, name: str) -> bytes | None:
        """The content of an object, or None where there is none."""
        try:
            return (self.path / name).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None

    def size(self, name: str) -> int | None:
        """The bytes of an object, or None where there is none."""
        try:
            return (self.path / name).stat().st_size
        except (FileNotFoundError, NotADirectoryError):
            return None

    def write(self, name: str, content: bytes) -> None:
        """Write an object in one step, over an earlier one."""
        write_bytes(self.path / name, content)

    def create(self, name: str, content: bytes) -> bool:
        """Write an object unless one of that name is there; says whether this call wrote it."""
        path = self.path / name
        make_folder(path.parent)
        beside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.part")
        write_bytes(beside, content)
        try:
            # A link never replaces a name, and what it leads to is whole already.
            os.link(beside, path)
        except FileExistsError:
            return False
        except (PermissionError, OSError) as error:
            return _create_without_links(path, content, error)
        finally:
            beside.unlink()
        sync(path.parent)
        return True

    def names(self, folder: str) -> list[str]:
        """The names of the objects directly in a folder, without it, sorted."""
        try:
            found = os.listdir(self.path / folder)
        except (FileNotFoundError, NotADirectoryError):
            return []
        return sorted(name for name in found if not name.startswith("."))

    def remove(self, name: str) -> None:
        """Remove an object, if it is there."""
        (self.path / name).unlink(missing_ok=True)


def _create_without_links(path: Path, content: bytes, why: OSError) -> bool:
    """On a file system without links: a reader may see part of it, which its seal then tells."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    except FileExistsError:
        return False
    except OSError:
        raise why from None
    with open(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(descriptor)
    return True


class Remote:
    """A place that fsspec opens."""

    def __init__(self, url: str, scheme: str) -> None:
        self.url = url.rstrip("/")
        self._scheme = scheme
        self._fs, root = _opened(self.url, scheme)
        self._root = root.rstrip("/")

    def read(self, name: str) -> bytes | None:
        """The content of an object, or None where there is none."""
        with self._reached():
            try:
                return self._fs.cat_file(self._path(name))
            except FileNotFoundError:
                return None

    def size(self, name: str) -> int | None:
        """The bytes of an object, or None where there is none."""
        with self._reached():
            try:
                return int(self._fs.info(self._path(name))["size"])
            except FileNotFoundError:
                return None

    def write(self, name: str, content: bytes) -> None:
        """Write an object in one step, over an earlier one."""
        with self._reached():
            if self._scheme == "ssh":
                self._fs.ftp.posix_rename(self._written_beside(name, content), self._path(name))
            else:
                self._fs.pipe_file(self._path(name), content)

    def create(self, name: str, content: bytes) -> bool:
        """Write an object unless one of that name is there; says whether this call wrote it."""
        with self._reached():
            try:
                if self._scheme == "ssh":
                    self._create_over_ssh(name, content)
                else:
                    self._fs.pipe_file(self._path(name), content, mode="create")
            except FileExistsError:
                # The first answer may have been lost on its way and the request sent again.
                return self.read(name) == content
        return True

    def names(self, folder: str) -> list[str]:
        """The names of the objects directly in a folder, without it, sorted."""
        with self._reached():
            try:
                self._fs.invalidate_cache()
                found = self._fs.ls(self._path(folder), detail=False)
            except FileNotFoundError:
                return []
        last = (str(path).rstrip("/").rpartition("/")[2] for path in found)
        return sorted(name for name in last if not name.startswith("."))

    def remove(self, name: str) -> None:
        """Remove an object, if it is there."""
        with self._reached(), suppress(FileNotFoundError):
            self._fs.rm_file(self._path(name))

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _create_over_ssh(self, name: str, content: bytes) -> None:
        beside, path = self._written_beside(name, content), self._path(name)
        try:
            # The protocol's plain rename fails where the name is taken; OpenSSH does it with `link`.
            self._fs.ftp.rename(beside, path)
        except OSError:
            self._fs.ftp.remove(beside)
            if self._fs.exists(path):
                raise FileExistsError(path) from None
            raise

    def _written_beside(self, name: str, content: bytes) -> str:
        above, _, last = self._path(name).rpartition("/")
        self._fs.makedirs(above, exist_ok=True)
        beside = f"{above}/.{last}.{uuid.uuid4().hex[:8]}.part"
        with self._fs.ftp.open(beside, "wb") as file:
            file.set_pipelined(True)
            file.write(content)
        return beside

    @contextmanager
    def _reached(self) -> Iterator[None]:
        try:
            yield
        except TriviumError:
            raise
        except Exception as error:
            # Every library below has its own families of errors: no route, no right, no such bucket.
            raise TriviumError(_unreachable(self.url, error)) from error


def _opened(url: str, scheme: str) -> tuple[Any, str]:
    """The file system behind an address, without any memory of what it listed, and the path in it."""
    import fsspec

    if scheme == "ssh":
        from fsspec.implementations.sftp import SFTPFileSystem

        options = SFTPFileSystem._get_kwargs_from_urls(url)
        try:
            made: Any = _ssh()(options.pop("host"), **options, skip_instance_cache=True)
        except ImportError:
            raise
        except Exception as error:
            raise TriviumError(_unreachable(url, error)) from error
        return made, SFTPFileSystem._strip_protocol(url)
    fs, path = fsspec.core.url_to_fs(url, use_listings_cache=False, skip_instance_cache=True)
    return fs, path


def _ssh() -> type:
    """The file system over ssh, which speaks only to machines that `known_hosts` names."""
    import paramiko
    from fsspec.implementations.sftp import SFTPFileSystem

    class KnownHosts(SFTPFileSystem):
        def _connect(self) -> None:
            self.client = paramiko.SSHClient()
            self.client.load_system_host_keys()
            self.client.set_missing_host_key_policy(paramiko.RejectPolicy())
            self.client.connect(self.host, **self.ssh_kwargs)
            self.ftp = self.client.open_sftp()

    return KnownHosts


def _unreachable(url: str, error: Exception) -> str:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return f"{url} cannot be used: {reason}; check the address, the network and your credentials."
