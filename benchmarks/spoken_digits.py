"""Spoken digits: espeak-ng says them in six voices, of which two are never heard in training.

    pip install espeakng-loader
    python benchmarks/spoken_digits.py [--seed 1] [--steps 200] [--to FOLDER]

Every digit is said at several speeds and pitches, and lies somewhere in a second of faint noise. Beside the
share that is named right in the voices held out stands what is guessed from noise and from another's digit.
"""

from __future__ import annotations

import ctypes
import wave
from itertools import product
from pathlib import Path

import numpy as np
from digit_questions import answers, arguments_of, learned, taught

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
LEARNED, HELD_OUT = ("m1", "m3", "f1", "f2"), ("m7", "f4")
QUESTION = "Which digit is said?"
RATE = 22_050
TOWER = "sound: {encoder: own, tokens_per_second: 12.5, layers: 2, width: 96, mels: 40}"


class Speaker:
    """espeak-ng's library, which says a word into memory."""

    def __init__(self) -> None:
        import espeakng_loader

        self._library = ctypes.CDLL(espeakng_loader.get_library_path())
        self._heard: list[np.ndarray] = []
        # 2: say it before returning, and hand the samples over.
        rate = self._library.espeak_Initialize(2, 0, espeakng_loader.get_data_path().encode(), 0)
        assert rate == RATE, rate
        form = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
        self._callback = form(self._keep)
        self._library.espeak_SetSynthCallback(self._callback)

    def _keep(self, samples: object, count: int, _: object) -> int:
        if samples and count:
            self._heard.append(np.ctypeslib.as_array(samples, (count,)).copy())  # type: ignore[call-overload]
        return 0

    def say(self, word: str, voice: str, speed: int, pitch: int) -> np.ndarray:
        """The word in this voice, int16 [samples]; speed in words a minute, pitch from 0 to 100."""
        self._heard.clear()
        library, text = self._library, word.encode()
        assert library.espeak_SetVoiceByName(f"en-us+{voice}".encode()) == 0, voice
        library.espeak_SetParameter(1, speed, 0)
        library.espeak_SetParameter(3, pitch, 0)
        assert library.espeak_Synth(text, ctypes.c_size_t(len(text) + 1), 0, 0, 0, 1, None, None) == 0
        return np.concatenate(self._heard)


def write(path: Path, said: np.ndarray, chance: np.random.Generator) -> None:
    """A second of faint noise with what was said somewhere in it."""
    samples = 60 * chance.standard_normal(RATE)
    start = chance.integers(0, max(1, RATE - len(said)))
    said = said[: RATE - start]
    samples[start : start + len(said)] += said * chance.uniform(0.4, 1.0)
    with wave.open(str(path), "wb") as writer:
        writer.setparams((1, 2, RATE, 0, "NONE", ""))
        writer.writeframes(np.clip(samples, -32768, 32767).astype("<i2").tobytes())


def main() -> None:
    """Say the digits, train, ask, and print the table."""
    arguments = arguments_of(__doc__, "spoken", steps=200)
    folder = arguments.to
    speaker, chance = Speaker(), np.random.default_rng(0)
    rows, test = [], []
    for voice in (*LEARNED, *HELD_OUT):
        speeds, pitches = (range(120, 200, 8), range(20, 81, 10))
        chosen = [*product(speeds, pitches)] if voice in LEARNED else [*product(speeds[::2], pitches[::2])]
        for (digit, word), (speed, pitch) in product(enumerate(WORDS), chosen):
            name = f"{voice}-{digit}-{speed}-{pitch}.wav"
            write(folder / name, speaker.say(word, voice, speed, pitch), chance)
            if voice in LEARNED:
                rows.append(taught("audio", name, QUESTION, digit))
            else:
                test.append((folder / name, str(digit)))
    write(folder / "noise.wav", np.zeros(10, np.int16), chance)
    model = learned(arguments, "spoken", "hear", TOWER, rows)
    paths, digits = zip(*test, strict=True)

    def right(shown: list[Path]) -> list[bool]:
        said = answers(model, "audio", shown, QUESTION)
        return [one == digit for one, digit in zip(said, digits, strict=True)]

    own = right([*paths])
    print(f"{len(rows)} sounds learned; named right of {len(own)} in voices held out: {np.mean(own):.3f}")
    for voice in HELD_OUT:
        mine = [one for one, path in zip(own, paths, strict=True) if path.name.startswith(voice)]
        print(f"  {voice}: {np.mean(mine):.3f}")
    moved = [paths[(place + 61) % len(paths)] for place in range(len(paths))]
    print(f"another one's sound: {np.mean(right(moved)):.3f}")
    print(f"noise alone: {np.mean(right([folder / 'noise.wav'] * len(paths))):.3f}")


if __name__ == "__main__":
    main()
