"""Files in a place, cut into parts named by their content: what is there is neither sent nor taken again."""

import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from trivium.kit.errors import DamagedError
from trivium.kit.files import bare_name, make_folder, sync
from trivium.kit.places import Place
from trivium.kit.seals import COMPLETE, RECORD
from trivium.pipeline.lease import LEASE

PART_BYTES = 32 << 20
"""Small enough that one request writes a part, and that what is cut off loses little."""
THREADS = 4


@dataclass(frozen=True)
class Sent:
    """A file whose parts are all in the place."""

    checksum: str
    parts: list[str]
    bytes: int
    """What really went over the wire."""


@dataclass(frozen=True)
class Parts:
    """The parts of files in a place; a part is compared with its name whenever it is read."""

    place: Place
    name: Callable[[str], str]
    """The name of the object that holds the part with a given checksum."""
    remedy: str
    """What to do about a damaged part, as the end of a sentence."""

    def push(self, path: Path, may: Callable[[], None] = lambda: None) -> Sent:
        """Send the parts of a file that are not there; `may` raises if there is no longer a right to."""
        whole, parts, moved = hashlib.blake2b(digest_size=16), [], 0
        with open(path, "rb") as file, ThreadPoolExecutor(THREADS) as threads:
            sent = []
            while content := file.read(PART_BYTES):
                may()
                whole.update(content)
                parts.append(_digest(content))
                sent.append(threads.submit(self._push, parts[-1], content))
                # No more than a few parts are held in memory.
                if len(sent) >= THREADS:
                    moved += sent.pop(0).result()
            moved += sum(one.result() for one in sent)
        return Sent(whole.hexdigest(), parts, moved)

    def _push(self, digest: str, content: bytes) -> int:
        if self.place.size(self.name(digest)) == len(content):
            return 0
        self.place.write(self.name(digest), content)
        return len(content)

    def missing(self, digests: Iterable[str]) -> list[str]:
        """Those of the parts that are not there."""
        wanted = list(digests)
        with ThreadPoolExecutor(THREADS) as threads:
            sizes = threads.map(self.place.size, map(self.name, wanted))
            return [digest for digest, size in zip(wanted, sizes, strict=True) if size is None]

    def pull(self, path: Path, digests: Sequence[str], expected: str, entry: str) -> int:
        """Write a file from its parts and compare it; the bytes that were fetched."""
        make_folder(path.parent)
        whole = hashlib.blake2b(digest_size=16)
        with open(path, "wb") as file:
            for content in self._read(digests, entry):
                whole.update(content)
                file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if whole.hexdigest() != expected:
            raise DamagedError(f"{path.name} of {entry} at {self.place.url} is damaged; {self.remedy}")
        return path.stat().st_size

    def _read(self, digests: Sequence[str], entry: str) -> Iterator[bytes]:
        """The content of parts in order, a few of them fetched ahead, each compared with its name."""
        with ThreadPoolExecutor(THREADS) as threads:
            ahead = [threads.submit(self.place.read, self.name(digest)) for digest in digests[:THREADS]]
            for number, digest in enumerate(digests):
                content = ahead.pop(0).result()
                if number + THREADS < len(digests):
                    ahead.append(threads.submit(self.place.read, self.name(digests[number + THREADS])))
                if content is None or _digest(content) != digest:
                    state = "missing" if content is None else "damaged"
                    where = f"{self.place.url}/{self.name(digest)}"
                    raise DamagedError(f"{where} of {entry} is {state}; {self.remedy}")
                yield content


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


LAST = ("metrics.jsonl", RECORD, COMPLETE)
"""What gets its name last when an entry arrives, so that half of one is never taken for work in progress."""


def landing(entry: Path) -> Path:
    """The folder in which an entry's files arrive; what a fetch that was cut off left there is used again."""
    beside = entry.with_name(f".{entry.name}.pull")
    make_folder(beside)
    return beside


def inside(manifest: str, name: str) -> Path:
    """A file's place in its entry; a name that leads elsewhere is refused."""
    for part in name.split("/"):
        bare_name(manifest, part)
    return Path(name)


def settle(beside: Path, folder: Path, names: Iterable[str]) -> None:
    """Give these files their names in an entry, in place of what is there; the caller holds its lock."""
    wanted = {beside / name for name in names}
    for path in sorted(beside.rglob("*"), reverse=True):
        if path.is_dir():
            sync(path)
        elif path not in wanted:
            # Of a fetch that was cut off, when the store held something else.
            path.unlink()
    (folder / COMPLETE).unlink(missing_ok=True)
    make_folder(folder)
    for old in sorted(folder.iterdir()):
        if old.name != "LOCK" and not old.name.startswith(LEASE):
            shutil.rmtree(old) if old.is_dir() and not old.is_symlink() else old.unlink()
    arrived = sorted(beside.iterdir(), key=lambda path: LAST.index(path.name) if path.name in LAST else -1)
    for path in arrived:
        os.rename(path, folder / path.name)
        if path.name in LAST:
            sync(folder)
    with suppress(OSError):
        beside.rmdir()
