"""Small pictures drawn with Pillow, and pictures and sounds as the data URLs that messages carry."""

import base64
import io
import math
import wave
from collections.abc import Sequence
from typing import Any

import numpy as np

from trivium.kit.errors import TriviumError

COLOURS = {
    "red": (214, 48, 49),
    "green": (46, 160, 67),
    "blue": (52, 92, 214),
    "yellow": (240, 200, 40),
    "purple": (150, 60, 190),
    "white": (245, 245, 245),
    "orange": (240, 130, 30),
    "cyan": (60, 200, 215),
}
SHAPES = ("circle", "square", "triangle", "cross", "ring", "diamond")
SUPERSAMPLING = 4
"""A picture is drawn so many times larger and then averaged, so that edges are smooth."""

Mark = tuple[str, str, float, float, float]
"""A shape, its colour, the place of its centre and its radius, in shares of the picture's side."""


def pillow() -> Any:
    """The drawing library, or the extra that brings it."""
    try:
        import PIL.Image
        import PIL.ImageDraw
        import PIL.ImageFont
    except ImportError:
        raise TriviumError("Pictures need Pillow: pip install 'trivium[pictures]'.") from None
    return PIL


def canvas(size: int, background: int) -> tuple[Any, Any]:
    """An empty picture of one grey, SUPERSAMPLING times as large as it will be, and what draws on it."""
    library = pillow()
    side = size * SUPERSAMPLING
    picture = library.Image.new("RGB", (side, side), (background,) * 3)
    return picture, library.ImageDraw.Draw(picture)


def finished(picture: Any) -> Any:
    """The drawn picture in its own size."""
    side = picture.width // SUPERSAMPLING
    return picture.resize((side, side), pillow().Image.Resampling.BOX)


def draw_mark(draw: Any, side: int, mark: Mark, background: int) -> None:
    """One shape on a picture whose side is `side` pixels."""
    shape, colour, x, y, radius = mark
    x, y, radius = x * side, y * side, radius * side
    ink = COLOURS[colour]
    box = (x - radius, y - radius, x + radius, y + radius)
    if shape in ("circle", "ring"):
        draw.ellipse(box, fill=ink)
        if shape == "ring":
            inner = radius * 0.55
            draw.ellipse((x - inner, y - inner, x + inner, y + inner), fill=(background,) * 3)
    elif shape == "square":
        half = radius * 0.88
        draw.rectangle((x - half, y - half, x + half, y + half), fill=ink)
    elif shape == "diamond":
        draw.polygon([(x, y - radius), (x + radius, y), (x, y + radius), (x - radius, y)], fill=ink)
    elif shape == "triangle":
        corners = [(x + radius * math.sin(a), y - radius * math.cos(a)) for a in (0.0, 2.0944, 4.1888)]
        draw.polygon(corners, fill=ink)
    else:
        arm = radius * 0.34
        draw.rectangle((x - radius, y - arm, x + radius, y + arm), fill=ink)
        draw.rectangle((x - arm, y - radius, x + arm, y + radius), fill=ink)


def marks(drawn: Sequence[Mark], size: int, background: int) -> Any:
    """A picture of these shapes."""
    picture, draw = canvas(size, background)
    for mark in drawn:
        draw_mark(draw, picture.width, mark, background)
    return finished(picture)


def digit(text: str, size: int, colour: str, x: float, y: float, height: float, background: int) -> Any:
    """A picture of a number in print, its middle at (x, y)."""
    picture, draw = canvas(size, background)
    font = pillow().ImageFont.load_default(height * picture.width)
    draw.text((x * picture.width, y * picture.width), text, fill=COLOURS[colour], font=font, anchor="mm")
    return finished(picture)


def bars(heights: Sequence[float], colours: Sequence[str], size: int, background: int) -> Any:
    """A bar chart: one bar of each colour, heights as shares of the picture's side."""
    picture, draw = canvas(size, background)
    side, width = picture.width, 0.86 / len(heights)
    for place, (height, colour) in enumerate(zip(heights, colours, strict=True)):
        left = 0.07 + place * width + 0.12 * width
        right = 0.07 + (place + 1) * width - 0.12 * width
        draw.rectangle((left * side, (0.94 - height) * side, right * side, 0.94 * side), fill=COLOURS[colour])
    return finished(picture)


def picture_part(picture: Any) -> dict[str, Any]:
    """A picture as a part of a message, in OpenAI's form."""
    file = io.BytesIO()
    picture.save(file, format="PNG", optimize=False)
    url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": url}}


def sound_part(samples: np.ndarray, rate: int) -> dict[str, Any]:
    """A sound, [samples] from -1 to 1, as a part of a message, in OpenAI's form."""
    file = io.BytesIO()
    with wave.open(file, "wb") as writer:
        writer.setnchannels(1)
        writer.setsampwidth(2)
        writer.setframerate(rate)
        writer.writeframes((np.clip(samples, -1, 1) * 32767).astype("<i2").tobytes())
    data = base64.b64encode(file.getvalue()).decode()
    return {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}}
