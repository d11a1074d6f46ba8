"""Pictures from anywhere to the pixels that an encoder sees: read safely, turned upright, brought to size."""

import base64
import binascii
import io
import math
import stat
import struct
import threading
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from trivium.kit.errors import TriviumError, needing
from trivium.tokens.items import Item

MOST_PIXELS = 50_000_000
"""Larger pictures are refused by their header, before a pixel of them is decoded."""
MOST_BYTES = 64 << 20
_DECODING = threading.Semaphore(2)
"""Two pictures are decoded at a time, so that many requests do not fill the memory at once."""
_PIECE = 1 << 20
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")


@dataclass(frozen=True)
class PictureForm:
    """How a picture becomes pixels and tokens.

    `pad` keeps the proportions and fills the rest, `stretch` does not keep them, `crop` keeps them and cuts
    the middle out (CLIP). With more than one tile, a long or large picture is cut into a grid of tiles, and a
    small view of the whole comes first.
    """

    side: int
    tokens: int
    """Of each tile."""
    resize: Literal["pad", "stretch", "crop"] = "pad"
    filter: int = 3
    """Pillow's number of the filter: 2 is bilinear, 3 bicubic."""
    tiles: int = 1


def pillow() -> Any:
    """Pillow's Image module, or the extra that brings it."""
    with needing("Pictures need Pillow: pip install 'trivium[pictures]'."):
        import PIL.Image
        import PIL.ImageOps
    return PIL


@dataclass
class PixelBudget:
    """How many pixels may be decoded in one picture, and how many are left for all."""

    largest: int
    left: int

    def take(self, pixels: int) -> None:
        """Count pixels that are about to be decoded, and refuse them beyond the bound."""
        self.left -= max(0, pixels)
        if self.left < 0:
            raise TriviumError("The pictures have more pixels than one request may hold: make them smaller.")


def opened_picture(data: bytes, name: str, budget: PixelBudget | None = None) -> np.ndarray:
    """The first frame of a picture, upright, in 8-bit RGB on white: uint8 [height, width, 3]."""
    if not data:
        raise TriviumError(f"{name} is empty: it holds no picture.")
    if len(data) > MOST_BYTES:
        raise TriviumError(f"{name} has {len(data):,} bytes; a picture has at most {MOST_BYTES:,}.")
    library = pillow()
    try:
        with warnings.catch_warnings():
            # The size is judged below; the library's own warning says the same less clearly.
            warnings.simplefilter("ignore")
            picture = library.Image.open(io.BytesIO(data), formats=FORMATS)
            width, height = picture.size
            most = MOST_PIXELS if budget is None else min(MOST_PIXELS, budget.largest)
            if width * height > most:
                raise TriviumError(
                    f"{name} has {width} × {height} pixels, more than {most:,}: make it smaller first."
                )
            picture.seek(0)
            picture.draft("RGB", (2048, 2048))
            if budget is not None:
                budget.take(picture.size[0] * picture.size[1])
            with _DECODING:
                picture = library.ImageOps.exif_transpose(picture)
                return np.asarray(_in_rgb(picture, library), dtype=np.uint8)
    except TriviumError:
        raise
    except library.Image.DecompressionBombError as error:
        raise TriviumError(f"{name} has more than {MOST_PIXELS:,} pixels: make it smaller first.") from error
    except (OSError, ValueError, SyntaxError, EOFError, MemoryError, ArithmeticError, LookupError, TypeError,
            AttributeError, struct.error, NotImplementedError) as error:  # fmt: skip
        reason = str(error).split(" <")[0] or type(error).__name__
        raise TriviumError(
            f"{name} is not a picture that can be read ({reason}); use PNG, JPEG, WebP, GIF, BMP or TIFF."
        ) from error


def _in_rgb(picture: Any, library: Any) -> Any:
    """Any mode as RGB: 16 bits are scaled to 8, what is transparent lies on white."""
    if picture.mode.startswith("I;16") or picture.mode in ("I", "F"):
        picture = library.Image.fromarray(_in_eight_bits(np.asarray(picture), picture.mode))
    if picture.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        white = library.Image.new("RGBA", picture.size, (255, 255, 255, 255))
        picture = library.Image.alpha_composite(white, picture)
    return picture.convert("RGB")


def _in_eight_bits(values: np.ndarray, mode: str) -> np.ndarray:
    """Grey values of more bits from 0 to 255, never as a whole picture of floats."""
    sixteen = values.dtype.kind == "u" and values.dtype.itemsize == 2
    highest = float(
        values.max(initial=0) if sixteen else np.max(values, where=np.isfinite(values), initial=0)
    )
    top = 1.0 if mode == "F" and highest <= 1 else 65535.0
    top = 255.0 if mode != "I;16" and 1 < highest <= 255 else top
    if sixteen:
        table = np.clip(np.arange(1 << 16) / top * 255, 0, 255).round().astype(np.uint8)
        return table[values]
    flat, result = values.reshape(-1), np.empty(values.size, np.uint8)
    for start in range(0, len(flat), _PIECE):
        piece = flat[start : start + _PIECE].astype(np.float64)
        piece = np.nan_to_num(piece, nan=0.0, posinf=0.0, neginf=0.0)
        result[start : start + _PIECE] = np.clip(piece / top * 255, 0, 255).round()
    return result.reshape(values.shape)


def _resized(pixels: np.ndarray, width: int, height: int, form: PictureForm) -> np.ndarray:
    if pixels.shape[:2] == (height, width):
        return pixels
    picture = pillow().Image.fromarray(pixels)
    return np.asarray(picture.resize((width, height), resample=form.filter), dtype=np.uint8)


def _padded(pixels: np.ndarray, width: int, height: int, form: PictureForm) -> np.ndarray:
    """The picture in its proportions in the middle of a grey area of this size."""
    scale = min(width / pixels.shape[1], height / pixels.shape[0])
    inner = (max(1, round(pixels.shape[1] * scale)), max(1, round(pixels.shape[0] * scale)))
    small = _resized(pixels, *inner, form)
    area = np.full((height, width, 3), 128, dtype=np.uint8)
    left, top = (width - inner[0]) // 2, (height - inner[1]) // 2
    area[top : top + inner[1], left : left + inner[0]] = small
    return area


def _cropped(pixels: np.ndarray, side: int, form: PictureForm) -> np.ndarray:
    """The middle square of the picture whose shorter side was brought to `side`."""
    height, width = pixels.shape[:2]
    if width <= height:
        size = (side, int(side * height / width))
    else:
        size = (int(side * width / height), side)
    # A strip would become longer than memory: only its middle can be in the square.
    if max(size) > 64 * side:
        middle, half = max(height, width) // 2, 32 * min(height, width)
        span = slice(max(0, middle - half), middle + half)
        return _cropped(pixels[span] if height > width else pixels[:, span], side, form)
    large = _resized(pixels, *size, form)
    top, left = (large.shape[0] - side) // 2, (large.shape[1] - side) // 2
    return large[top : top + side, left : left + side]


def grid_of(height: int, width: int, form: PictureForm) -> tuple[int, int]:
    """The rows and columns of tiles: as large as the picture needs, with its proportions kept best."""
    best, best_score = (1, 1), -1.0
    for rows in range(1, form.tiles + 1):
        for columns in range(1, form.tiles // rows + 1):
            scale = min(columns * form.side / width, rows * form.side / height)
            # Beyond its own size a picture shows nothing more; empty tiles cost tokens.
            shown = min(scale, 1.0) ** 2 * width * height
            score = shown - 1e-3 * rows * columns * form.side**2
            if score > best_score:
                best, best_score = (rows, columns), score
    return best


def picture_item(pixels: np.ndarray, form: PictureForm) -> Item:
    """The picture as an encoder sees it: uint8 [tiles, side, side, 3]."""
    side = form.side
    if form.resize == "stretch":
        tiles = [_resized(pixels, side, side, form)]
    elif form.resize == "crop":
        tiles = [_cropped(pixels, side, form)]
    else:
        tiles = [_padded(pixels, side, side, form)]
    rows, columns = grid_of(pixels.shape[0], pixels.shape[1], form) if form.tiles > 1 else (1, 1)
    if rows * columns > 1:
        large = _padded(pixels, columns * side, rows * side, form)
        tiles += [
            large[row * side : (row + 1) * side, column * side : (column + 1) * side]
            for row in range(rows)
            for column in range(columns)
        ]
    return Item("picture", np.stack(tiles), form.tokens * len(tiles))


def file_bytes(path: Path, what: str) -> bytes:
    """The content of a picture's or a sound's file."""
    try:
        # A device or a pipe has no end, or waits for one.
        if not stat.S_ISREG(path.stat().st_mode):
            raise TriviumError(f"{path} is no regular file; name the file of a {what}.")
        with path.open("rb") as file:
            data = file.read(MOST_BYTES + 1)
        if len(data) > MOST_BYTES:
            raise TriviumError(f"{path} has more than {MOST_BYTES:,} bytes, the most of a {what}.")
        return data
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise TriviumError(f"The {what} {path} cannot be read: {reason}.") from error


def data_bytes(text: str, what: str) -> bytes:
    """The bytes in base64 text."""
    if len(text) > MOST_BYTES * 4 // 3 + 4:
        raise TriviumError(f"A {what} in a message has at most {MOST_BYTES:,} bytes.")
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise TriviumError(f"A {what} in a message is no valid base64: {error}.") from error


def tokens_of_square(side: int, patch: int, tokens: int) -> int:
    """By how much patches are joined along each side so that a square picture is so many tokens."""
    across = side // patch
    root = math.isqrt(tokens)
    if root * root != tokens or across % root:
        raise TriviumError(
            f"A picture of {side} pixels in patches of {patch} has {across} × {across} patches, which cannot "
            f"be joined to {tokens} tokens; take a square number whose root divides {across}."
        )
    return across // root
