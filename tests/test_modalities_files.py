"""Pictures and sounds as they are found in the world: odd, huge, damaged, hostile."""

import io
import os
import struct
import tracemalloc
import zlib
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from seeing import png, wav

from trivium.kit.errors import TriviumError
from trivium.tokens.pictures import (
    MOST_PIXELS,
    PictureForm,
    file_bytes,
    grid_of,
    opened_picture,
    picture_item,
)
from trivium.tokens.sounds import RATE, SoundForm, opened_sound, sound_item

FORM = PictureForm(32, 16)


def saved(picture, kind="PNG", **how):
    file = io.BytesIO()
    picture.save(file, kind, **how)
    return file.getvalue()


def bomb(width, height):
    """A PNG of a few bytes whose header says that it is huge."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"x" * 99) + chunk(b"IEND", b"")


def test_a_bomb_is_refused_before_it_is_decoded(monkeypatch):
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("it was decoded"))
    with pytest.raises(TriviumError, match=r"a\.png has more than 50,000,000 pixels"):
        opened_picture(bomb(30_000, 30_000), "a.png")
    with pytest.raises(TriviumError, match=r"8000 × 8000 pixels, more than 50,000,000"):
        opened_picture(bomb(8_000, 8_000), "a.png")


def test_a_large_picture_is_brought_to_size():
    picture = Image.new("RGB", (6000, 1000), (10, 200, 10))
    assert MOST_PIXELS > 6000 * 1000
    item = picture_item(opened_picture(saved(picture), "a.png"), FORM)
    assert item.data.shape == (1, 32, 32, 3)
    assert (item.data[0, 16, 16] == (10, 200, 10)).all()
    assert (item.data[0, 0] == 128).all(), "the proportions are kept"


@pytest.mark.parametrize("size", [(1, 1), (1, 4000), (4000, 1), (33, 31)])
@pytest.mark.parametrize("resize", ["pad", "stretch", "crop"])
def test_any_proportions_become_a_square(size, resize):
    pixels = opened_picture(png(size=size), "a.png")
    item = picture_item(pixels, PictureForm(32, 16, resize))
    assert item.data.shape == (1, 32, 32, 3)


def test_tiles_follow_the_proportions_and_stay_within_their_number():
    form = PictureForm(32, 4, tiles=6)
    assert grid_of(32, 32, form) == (1, 1)
    assert grid_of(64, 96, form) == (2, 3)
    assert grid_of(400, 32, form) == (6, 1)
    wide = picture_item(opened_picture(png(size=(96, 64)), "a.png"), form)
    assert wide.data.shape == (7, 32, 32, 3)
    assert wide.tokens == 28


def test_an_animation_shows_its_first_frame():
    frames = [Image.new("RGB", (16, 16), colour) for colour in ((250, 0, 0), (0, 250, 0))]
    data = saved(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert np.abs(opened_picture(data, "a.gif")[8, 8].astype(int) - (250, 0, 0)).max() < 4


def test_sixteen_bits_become_eight():
    values = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    pixels = opened_picture(saved(Image.fromarray(values)), "a.png")
    assert np.abs(pixels[..., 0].astype(float) - values / 257).max() <= 1
    assert np.ptp(pixels.astype(int), axis=-1).max() == 0


def test_sixteen_bits_need_no_more_memory_than_the_picture():
    data = saved(Image.new("I;16", (2000, 2000), 30_000))
    tracemalloc.start()
    pixels = opened_picture(data, "a.png")
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert pixels[0, 0, 0] == 117
    # Pillow's own pixels are not traced; floats of the whole picture were 16 bytes each of them.
    assert most < 15 * 4_000_000


def test_what_is_no_regular_file_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    for path in (Path("/dev/zero"), tmp_path / "pipe.png", tmp_path):
        with pytest.raises(TriviumError, match="no regular file"):
            file_bytes(path, "picture")


def test_cmyk_palettes_greys_and_alpha_become_rgb():
    for mode in ("CMYK", "L", "P", "1"):
        picture = Image.new("RGB", (16, 16), (255, 255, 255)).convert(mode)
        kind = "JPEG" if mode == "CMYK" else "PNG"
        pixels = opened_picture(saved(picture, kind), "a")
        assert pixels.shape == (16, 16, 3)
        assert pixels.min() > 250
    clear = Image.new("RGBA", (16, 16), (0, 0, 0, 0))
    assert opened_picture(saved(clear), "a.png").min() == 255, "what is transparent lies on white"


def test_the_rotation_of_a_camera_is_applied():
    picture = Image.new("RGB", (20, 10), (255, 255, 255))
    picture.paste((0, 0, 0), (0, 0, 5, 5))
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = opened_picture(saved(picture, "JPEG", exif=exif, quality=95), "a.jpg")
    assert pixels.shape == (20, 10, 3)
    assert pixels[1, 8].max() < 60, "the dark corner is at the upper right"


@pytest.mark.parametrize(
    "data",
    [b"", b"x", b"<svg/>", png()[:40], png()[:-30], png()[:20] + b"\0" * 60, b"GIF89a" + b"\xff" * 30,
     saved(Image.new("RGB", (64, 64)), "JPEG")[:300], b"RIFF\0\0\0\0WEBPVP8 ", b"%PDF-1.4", b"\xff\xd8\xff"],
)  # fmt: skip
def test_a_damaged_picture_is_named_in_a_sentence(data):
    with pytest.raises(TriviumError, match=r"b\.png") as refusal:
        opened_picture(data, "b.png")
    assert "\n" not in str(refusal.value)


def test_flipped_bytes_end_in_a_picture_or_a_sentence():
    random = np.random.default_rng(0)
    for kind in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"):
        whole = saved(Image.fromarray(random.integers(0, 255, (24, 24, 3), np.uint8)), kind)
        for _ in range(60):
            data = bytearray(whole)
            for place in random.integers(0, min(len(data), 200), 3):
                data[place] = random.integers(0, 256)
            with suppress(TriviumError):
                assert opened_picture(bytes(data), "b").shape[2] == 3


def dominant(samples):
    return np.abs(np.fft.rfft(samples * np.hanning(len(samples)))).argmax() * RATE / len(samples)


@pytest.mark.parametrize("rate", [8_000, 11_025, 16_000, 44_100, 48_000])
@pytest.mark.parametrize(("channels", "width"), [(1, 1), (1, 2), (2, 2), (2, 3), (1, 4)])
def test_any_rate_and_number_of_channels_becomes_one_at_16_khz(rate, channels, width):
    samples = opened_sound(wav(700, 0.5, rate, channels, width), "a.wav", 30)
    assert len(samples) == pytest.approx(0.5 * RATE, abs=2)
    assert dominant(samples) == pytest.approx(700, abs=5)
    assert np.abs(samples).max() == pytest.approx(0.5, abs=0.02)


def test_what_lies_above_the_band_does_not_fold_into_it():
    samples = opened_sound(wav(15_000, 0.5, 48_000), "a.wav", 30)
    assert np.abs(samples[500:-500]).max() < 0.05


def test_silent_and_clipped_sounds_are_heard():
    silent = opened_sound(wav(loud=0.0), "a.wav", 30)
    assert np.abs(silent).max() == 0
    clipped = opened_sound(wav(loud=0.999), "a.wav", 30)
    assert np.abs(clipped).max() <= 1
    for samples in (silent, clipped):
        assert sound_item(samples, SoundForm(8)).tokens == 4


def test_a_sound_that_lasts_too_long_is_refused():
    with pytest.raises(TriviumError, match=r"a\.wav lasts 31\.0 seconds, and the model hears 30 at most"):
        opened_sound(wav(seconds=31, rate=8_000), "a.wav", 30)


@pytest.mark.parametrize(
    "data",
    [b"", b"x", b"ID3\x04mp3", wav()[:30], wav()[:44], b"RIFF\0\0\0\0WAVEfmt \x10\0\0\0" + b"\0" * 16,
     wav().replace(b"\x80>\0\0", b"\0\0\0\0", 1)],
)  # fmt: skip
def test_a_damaged_sound_is_named_in_a_sentence(data):
    with pytest.raises(TriviumError, match=r"b\.wav") as refusal:
        opened_sound(data, "b.wav", 30)
    assert "\n" not in str(refusal.value)
