"""Places that hold named objects whole: a folder, a bucket (`s3://`, `gs://`), another machine (`ssh://`).

An object is written in one step, and `create` writes only what is not there yet: of several machines that
create one name, exactly one succeeds. On S3 and GCS the store itself sees to that (`If-None-Match: *`,
`ifGenerationMatch=0`); on a file system a name is given by `link`, over ssh by a `rename` that does not
replace. Everything that machines agree on through a place rests on this one operation.
"""

import os
import re
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

from trivium.kit.errors import TriviumError
from trivium.kit.files import expanded, make_folder, sync, write_bytes

SCHEMES = ("file", "s3", "gs", "ssh")
_SECONDS = 60.0
"""How long another machine may leave a request over ssh unanswered."""
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
        return (OverSsh if scheme == "ssh" else Remote)(str(url))
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
        try:
            return (self.path / name).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None

    def size(self, name: str) -> int | None:
        try:
            return (self.path / name).stat().st_size
        except (FileNotFoundError, NotADirectoryError):
            return None

    def write(self, name: str, content: bytes) -> None:
        write_bytes(self.path / name, content)

    def create(self, name: str, content: bytes) -> bool:
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
        try:
            found = os.listdir(self.path / folder)
        except (FileNotFoundError, NotADirectoryError):
            return []
        return sorted(name for name in found if not name.startswith("."))

    def remove(self, name: str) -> None:
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

    def __init__(self, url: str) -> None:
        self.url = without_password(url)
        self._creates_once = False
        self._fs, root = self._opened(url)
        self._root = root.rstrip("/")

    def read(self, name: str) -> bytes | None:
        with self._reached():
            try:
                return self._fs.cat_file(self._path(name))
            except FileNotFoundError:
                return None

    def size(self, name: str) -> int | None:
        with self._reached():
            try:
                return int(self._fs.info(self._path(name))["size"])
            except FileNotFoundError:
                return None

    def write(self, name: str, content: bytes) -> None:
        with self._reached():
            self._fs.pipe_file(self._path(name), content)

    def create(self, name: str, content: bytes) -> bool:
        if not self._creates_once:
            self._try_to_create_twice()
        return self._created(name, content)

    def _created(self, name: str, content: bytes) -> bool:
        with self._reached():
            try:
                self._create(self._path(name), content)
            except FileExistsError:
                # The first answer may have been lost on its way and the request sent again.
                return self.read(name) == content
        return True

    def _try_to_create_twice(self) -> None:
        """Refuse a store, or a library to reach it, that overwrites where it was asked to create.

        Versions before 2024.12 of the libraries and some servers ignore the condition without a word.
        """
        name = f"probes/{uuid.uuid4().hex}"
        if not self._created(name, b"first") or self._created(name, b"second"):
            raise TriviumError(
                f"{self.url} overwrites what it was asked to create only once, so machines cannot share it;"
                " use another store, or upgrade: pip install -U 'trivium[store]'."
            )
        self.remove(name)
        self._creates_once = True

    def names(self, folder: str) -> list[str]:
        with self._reached():
            try:
                self._fs.invalidate_cache()
                found = self._fs.ls(self._path(folder), detail=False)
            except FileNotFoundError:
                return []
        last = (str(path).rstrip("/").rpartition("/")[2] for path in found)
        return sorted(name for name in last if not name.startswith("."))

    def remove(self, name: str) -> None:
        with self._reached(), suppress(FileNotFoundError):
            self._fs.rm_file(self._path(name))

    def _opened(self, url: str) -> tuple[Any, str]:
        """The file system behind an address, without any memory of what it listed, and the path in it."""
        import fsspec

        return fsspec.core.url_to_fs(url.rstrip("/"), use_listings_cache=False, skip_instance_cache=True)

    def _create(self, path: str, content: bytes) -> None:
        self._fs.pipe_file(path, content, mode="create")

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    @contextmanager
    def _reached(self) -> Iterator[None]:
        try:
            yield
        except TriviumError:
            raise
        except Exception as error:
            # Every library below has its own families of errors: no route, no right, no such bucket.
            raise _unreachable(self.url, error) from error


class OverSsh(Remote):
    """A folder of another machine; a name is given by a rename."""

    def write(self, name: str, content: bytes) -> None:
        with self._reached():
            beside = self._written_beside(self._path(name), content)
            self._fs.ftp.posix_rename(beside, self._path(name))

    def _create(self, path: str, content: bytes) -> None:
        beside = self._written_beside(path, content)
        try:
            # The protocol's plain rename fails where the name is taken; OpenSSH does it with `link`.
            self._fs.ftp.rename(beside, path)
        except OSError:
            self._fs.ftp.remove(beside)
            if self._fs.exists(path):
                raise FileExistsError(path) from None
            raise

    def _written_beside(self, path: str, content: bytes) -> str:
        above, _, last = path.rpartition("/")
        self._fs.makedirs(above, exist_ok=True)
        beside = f"{above}/.{last}.{uuid.uuid4().hex[:8]}.part"
        with self._fs.ftp.open(beside, "wb") as file:
            file.set_pipelined(True)
            file.write(content)
        return beside

    def _opened(self, url: str) -> tuple[Any, str]:
        from fsspec.implementations.sftp import SFTPFileSystem

        options = SFTPFileSystem._get_kwargs_from_urls(url)
        made = _ssh()
        with super()._reached():
            opened = made(options.pop("host"), **options, skip_instance_cache=True)
        return opened, SFTPFileSystem._strip_protocol(url)

    @contextmanager
    def _reached(self) -> Iterator[None]:
        with super()._reached(), self._fs.channel():
            yield


def _ssh() -> Any:
    """The file system over ssh, which speaks only to machines that `known_hosts` names."""
    import paramiko
    from fsspec.implementations.sftp import SFTPFileSystem

    class KnownHosts(SFTPFileSystem):
        def _connect(self) -> None:
            self.client = paramiko.SSHClient()
            self.client.load_system_host_keys()
            self.client.set_missing_host_key_policy(paramiko.RejectPolicy())
            self.client.connect(self.host, timeout=_SECONDS, **self.ssh_kwargs)
            self._free: list[paramiko.SFTPClient] = []
            self._connecting, self._used = threading.Lock(), threading.local()

        @property
        def ftp(self) -> paramiko.SFTPClient:
            """The channel that this thread uses."""
            return self._used.channel

        @contextmanager
        def channel(self) -> Iterator[None]:
            """A channel for this thread alone: on a shared one, a thread drops what another waits for."""
            before, channel = getattr(self._used, "channel", None), self._one()
            self._used.channel = channel
            try:
                yield
            except BaseException:
                # An answer may still be on its way.
                channel.close()
                raise
            finally:
                self._used.channel = before
                if not channel.get_channel().closed:
                    self._free.append(channel)

        def _one(self) -> paramiko.SFTPClient:
            with self._connecting:
                while self._free:
                    channel = self._free.pop()
                    if not channel.get_channel().closed:
                        return channel
                transport = self.client.get_transport()
                if transport is None or not transport.is_active():
                    self.client.connect(self.host, timeout=_SECONDS, **self.ssh_kwargs)
                opened = self.client.open_sftp()
            opened.get_channel().settimeout(_SECONDS)
            return opened

    return KnownHosts


def without_password(url: str) -> str:
    """An address as it may be shown and written down."""
    return re.sub(r"^([a-z0-9]+://[^/@:]*):[^/@]*@", r"\1@", url.rstrip("/"))


def _unreachable(url: str, error: Exception) -> TriviumError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return TriviumError(
        f"{url} cannot be used: {reason}; check the address, the network and your credentials."
    )
