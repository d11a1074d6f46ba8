"""Open a file as bytes, decompressing by its ending; one cut off, or far larger than it looks, is refused."""

import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import zstandard

from trivium.kit.errors import TriviumError

COMPRESSED = (".gz", ".zst")
MOST_EXPANDED, MOST_PER_BYTE = 1 << 26, 100
"""How far a compressed file may expand: to 64 MiB, or to 100 times its size if that is more."""
# A frame of zstd turns 4 bytes into 128 KiB at most, so these give 64 MiB at once.
_BLOCK = 1 << 11
KINDS = (".txt", ".text", ".md", ".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")


class _Frames(io.RawIOBase):
    """Zstandard frames one after another; unlike in the library, a frame that ends early is an error."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._frame = zstandard.ZstdDecompressor().decompressobj()
        self._begun = False
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        while not self._ready:
            block = self._frame.unused_data if self._frame.eof else b""
            if self._frame.eof:
                self._frame = zstandard.ZstdDecompressor().decompressobj()
                self._begun = False
            block = block or self._file.read(_BLOCK)
            if not block:
                if self._begun:
                    raise EOFError("the compressed stream ends early")
                return 0
            self._begun = True
            self._ready = memoryview(self._frame.decompress(block))
        size = min(len(buffer), len(self._ready))
        buffer[:size], self._ready = self._ready[:size], self._ready[size:]
        return size


class _Counted(io.RawIOBase):
    """The plain bytes of a compressed file, up to what a file of its size may expand to."""

    def __init__(self, path: Path, plain: io.RawIOBase | io.BufferedIOBase) -> None:
        self._path = path
        self._plain = plain
        self._left = max(MOST_EXPANDED, MOST_PER_BYTE * path.stat().st_size)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        size = self._plain.readinto(buffer) or 0
        self._left -= size
        if self._left < 0:
            raise TriviumError(
                f"{self._path} expands to more than {MOST_PER_BYTE} times its size, as no ordinary text does;"
                " decompress it yourself if you trust it."
            )
        return size


def kind_of(path: Path) -> str | None:
    """The ending that says how to read a file, without its compression; None if we cannot."""
    endings = [ending.lower() for ending in path.suffixes]
    if endings and endings[-1] in COMPRESSED:
        endings.pop()
    return endings[-1] if endings and endings[-1] in KINDS else None


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """The file's plain bytes; a compressed file that is damaged or cut off is named."""
    try:
        with path.open("rb") as file:
            ending = path.suffix.lower()
            if ending == ".gz":
                plain = gzip.GzipFile(fileobj=file)
                yield io.BufferedReader(_Counted(path, plain))  # type: ignore[misc]
            elif ending == ".zst":
                yield io.BufferedReader(_Counted(path, _Frames(file)))  # type: ignore[misc]
            else:
                yield file
    except (EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError) as error:
        raise TriviumError(f"{path} is damaged or cut off ({error}); fetch or compress it again.") from error
    except OSError as error:
        raise TriviumError(f"{path} cannot be read: {error.strerror or error}.") from error
