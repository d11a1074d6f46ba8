"""Sounds from WAV bytes to the samples that an encoder hears: one channel, 16,000 a second, 16 bits."""

import math
import struct
from dataclasses import dataclass

import numpy as np

from trivium.kit.errors import TriviumError
from trivium.tokens.items import Item

RATE = 16_000
HOP = 160
"""Samples between two frames of a spectrogram: 100 frames a second, as in Whisper."""
_PLAIN, _FLOAT, _EXTENSIBLE = 1, 3, 0xFFFE


@dataclass(frozen=True)
class SoundForm:
    """How a sound becomes samples and tokens."""

    frames_per_token: int
    """Frames of 10 ms that one token stands for."""
    longest: float = 30.0
    """Seconds; a longer sound is refused, so that nothing of it is lost silently."""


def opened_sound(data: bytes, name: str, longest: float) -> np.ndarray:
    """The samples of a WAV file, its channels averaged, at 16 kHz: float32 [samples] from -1 to 1."""
    if not data:
        raise TriviumError(f"{name} is empty: it holds no sound.")
    if data[:4] not in (b"RIFF", b"RIFX") or data[8:12] != b"WAVE":
        raise TriviumError(f"{name} is no WAV file, the only form of sound that is read: convert it to WAV.")
    order = "<" if data[:4] == b"RIFF" else ">"
    form: tuple[int, int, int, int] | None = None
    body: bytes | None = None
    place = 12
    while place + 8 <= len(data) and body is None:
        kind, size = data[place : place + 4], struct.unpack(f"{order}I", data[place + 4 : place + 8])[0]
        chunk = data[place + 8 : place + 8 + size]
        if kind == b"fmt " and len(chunk) >= 16:
            code, channels, rate, _, _, bits = struct.unpack(f"{order}HHIIHH", chunk[:16])
            if code == _EXTENSIBLE and len(chunk) >= 26:
                code = struct.unpack(f"{order}H", chunk[24:26])[0]
            form = (code, channels, rate, bits)
        elif kind == b"data":
            body = chunk
        place += 8 + size + size % 2
    if form is None or body is None:
        raise TriviumError(f"{name} is a damaged WAV file: it has no format or no samples.")
    code, channels, rate, bits = form
    if not 1 <= channels <= 64 or not 1_000 <= rate <= 400_000:
        raise TriviumError(f"{name} says it has {channels} channels at {rate} Hz, which cannot be read.")
    samples = _samples(body, code, bits, order, name)
    samples = samples[: len(samples) // channels * channels].reshape(-1, channels).mean(1)
    if not len(samples):
        raise TriviumError(f"{name} holds no samples.")
    if len(samples) / rate > longest:
        raise TriviumError(
            f"{name} lasts {len(samples) / rate:.1f} seconds, and the model hears {longest:g} at most: "
            "cut it."
        )
    if not np.isfinite(samples).all():
        raise TriviumError(f"{name} holds samples that are not finite; write it again.")
    return np.clip(resampled(samples, rate), -1, 1).astype(np.float32)


def _samples(body: bytes, code: int, bits: int, order: str, name: str) -> np.ndarray:
    """The numbers of a WAV file from -1 to 1, channels interleaved."""
    size = bits // 8
    if code == _FLOAT and bits in (32, 64):
        return np.frombuffer(body[: len(body) // size * size], f"{order}f{size}").astype(np.float64)
    if code != _PLAIN or bits not in (8, 16, 24, 32):
        raise TriviumError(f"{name} holds compressed sound (WAV format {code}, {bits} bits); write it plain.")
    body = body[: len(body) // size * size]
    if bits == 8:
        return (np.frombuffer(body, np.uint8).astype(np.float64) - 128) / 128
    if bits == 24:
        raw = np.frombuffer(body, np.uint8).reshape(-1, 3)
        raw = raw if order == "<" else raw[:, ::-1]
        joined = np.zeros((len(raw), 4), np.uint8)
        joined[:, 1:] = raw
        return joined.view("<i4")[:, 0].astype(np.float64) / 2**31
    return np.frombuffer(body, f"{order}i{size}").astype(np.float64) / 2 ** (bits - 1)


def resampled(samples: np.ndarray, rate: int) -> np.ndarray:
    """The sound at 16 kHz: a windowed sinc at the new places, its band the narrower of the two."""
    if rate == RATE:
        return samples
    length = max(1, round(len(samples) * RATE / rate))
    band = min(1.0, RATE / rate)
    reach = math.ceil(16 / band)
    result = np.empty(length)
    padded = np.pad(samples, reach + 1)
    for start in range(0, length, 65536):
        places = np.arange(start, min(length, start + 65536)) * (rate / RATE)
        base = np.floor(places).astype(np.int64)
        total = np.zeros(len(places))
        for offset in range(-reach, reach + 1):
            distance = places - (base + offset)
            window = 0.5 + 0.5 * np.cos(np.pi * np.clip(distance / (reach + 1), -1, 1))
            total += padded[base + offset + reach + 1] * np.sinc(distance * band) * band * window
        result[start : start + len(places)] = total
    return result


def sound_item(samples: np.ndarray, form: SoundForm) -> Item:
    """The sound as an encoder hears it, and how many tokens it is."""
    frames = max(1, math.ceil(len(samples) / HOP))
    data = np.round(samples * 32767).astype("<i2")
    return Item("sound", data, math.ceil(frames / form.frames_per_token))
