"""The sound encoder: samples to a log-mel spectrogram, through two convolutions to states (Whisper, 2022)."""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trivium.model.arithmetic import note_module
from trivium.model.modalities.encoder import Encoder, EncoderConfig
from trivium.tokens.sounds import HOP, RATE

WINDOW = 400


@dataclass(frozen=True)
class SoundConfig:
    """A sound encoder: our own, or Whisper's."""

    encoder: EncoderConfig
    mels: int = 80
    frames: int | None = None
    """Frames to which every sound is filled with silence, as Whisper's to 3,000; None: its own length."""


@lru_cache(maxsize=4)
def mel_filters(mels: int) -> np.ndarray:
    """Triangular filters on Slaney's mel scale, each of area one: float32 [mels, WINDOW // 2 + 1].

    The scale is linear up to 1,000 Hz (3 mel for 200 Hz) and logarithmic above (27 mel for a factor 6.4).
    """

    def hertz(mel: np.ndarray) -> np.ndarray:
        return np.where(mel < 15, mel * 200 / 3, 1000 * np.exp(np.log(6.4) / 27 * (mel - 15)))

    highest = 15 + math.log(RATE / 2 / 1000) * 27 / math.log(6.4)
    edges = hertz(np.linspace(0, highest, mels + 2))
    places = np.linspace(0, RATE / 2, WINDOW // 2 + 1)
    rising = (places - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    falling = (edges[2:, None] - places) / (edges[2:] - edges[1:-1])[:, None]
    filters = np.maximum(0, np.minimum(rising, falling)) * (2 / (edges[2:] - edges[:-2]))[:, None]
    return filters.astype(np.float32)


def log_mel(samples: Tensor, mels: int) -> Tensor:
    """Sounds, float32 [sounds, samples], as Whisper's features, [sounds, mels, samples / HOP]."""
    window = torch.hann_window(WINDOW, device=samples.device)
    spectrum = torch.stft(samples, WINDOW, HOP, window=window, return_complex=True)
    power = spectrum[..., :-1].abs() ** 2
    filtered = torch.from_numpy(mel_filters(mels)).to(samples.device) @ power
    decades = filtered.clamp(min=1e-10).log10()
    # What is eight decades below the loudest is silence.
    decades = torch.maximum(decades, decades.amax((-2, -1), keepdim=True) - 8)
    return (decades + 4) / 4


def sinusoids(length: int, width: int) -> Tensor:
    """Whisper's fixed positions: sines and cosines of falling frequencies, [length, width]."""
    rates = torch.exp(-math.log(10_000) / (width // 2 - 1) * torch.arange(width // 2))
    angles = torch.arange(length)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class SoundEncoder(nn.Module):
    """Samples to one state for every 20 milliseconds."""

    def __init__(self, config: SoundConfig) -> None:
        super().__init__()
        self.config = config
        width = config.encoder.width
        self.first = nn.Conv1d(config.mels, width, 3, padding=1)
        self.second = nn.Conv1d(width, width, 3, stride=2, padding=1)
        self.encoder = Encoder(config.encoder)

    def features(self, samples: Tensor) -> Tensor:
        """The spectrogram of sounds, int16 [sounds, samples] -> float32 [sounds, mels, frames]."""
        whole = -(-samples.shape[1] // HOP) if self.config.frames is None else self.config.frames
        waves = F.pad(samples.float() / 32767, (0, whole * HOP - samples.shape[1]))
        if waves.shape[1] <= WINDOW:
            # The transform mirrors the ends, for which a shorter sound has too few samples.
            waves = F.pad(waves, (0, WINDOW + 1 - waves.shape[1]))
        return log_mel(waves, self.config.mels)[..., :whole]

    def forward(self, samples: Tensor) -> Tensor:
        """States of sounds of one length, int16 [sounds, samples] -> [sounds, frames / 2, width]."""
        return self.from_features(self.features(samples))

    def from_features(self, features: Tensor) -> Tensor:
        """States of spectrograms, [sounds, mels, frames] -> [sounds, frames / 2, width]."""
        features = features.to(self.first.weight.dtype)
        note_module(self.first, features)
        rows = F.gelu(self.first(features))
        note_module(self.second, rows)
        rows = F.gelu(self.second(rows)).transpose(1, 2)
        places = sinusoids(rows.shape[1], rows.shape[2]).to(rows.device, rows.dtype)
        return self.encoder(rows + places)
