"""A tiny model with eyes and ears, and pictures and sounds to show it."""

import copy
import io
import wave

import numpy as np
import torch
from generating import tiny_model, tokenizer
from PIL import Image

from trivium.model.modalities.encoder import EncoderConfig
from trivium.model.modalities.projector import ProjectorConfig
from trivium.model.modalities.sound import SoundConfig
from trivium.model.modalities.towers import Modalities, ModalitiesConfig, PictureConfig, SoundsConfig
from trivium.model.modalities.vision import VisionConfig
from trivium.tokens.forms import Forms
from trivium.tokens.pictures import PictureForm
from trivium.tokens.sounds import SoundForm

FORMS = Forms(PictureForm(16, 4), SoundForm(8))


def seeing_model(seed=0, **changes):
    """The engine's tiny model with random towers whose rows differ much between pictures."""
    model = tiny_model(seed, **changes)
    encoder = EncoderConfig(32, 1, 2, 48)
    width = model.config.width
    torch.manual_seed(seed)
    model.modalities = Modalities(
        ModalitiesConfig(
            FORMS,
            PictureConfig(VisionConfig(encoder, 16, 4), ProjectorConfig("mlp", 32, width, 2)),
            SoundsConfig(SoundConfig(encoder, 40), ProjectorConfig("linear", 32, width, 4)),
        )
    ).eval()
    with torch.no_grad():
        for parameter in model.modalities.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def seeing_tokenizer():
    return copy.copy(tokenizer()).with_forms(FORMS)


def png(colour=(200, 30, 30), size=(20, 16), **how):
    file = io.BytesIO()
    Image.new(how.pop("mode", "RGB"), size, colour).save(file, how.pop("format", "PNG"), **how)
    return file.getvalue()


def wav(pitch=440.0, seconds=0.3, rate=16_000, channels=1, width=2, loud=0.5):
    file = io.BytesIO()
    with wave.open(file, "wb") as writer:
        writer.setparams((channels, width, rate, 0, "NONE", ""))
        samples = loud * np.sin(2 * np.pi * pitch * np.arange(round(seconds * rate)) / rate)
        samples = np.repeat(samples[:, None], channels, 1)
        if width == 1:
            writer.writeframes((samples * 127 + 128).astype(np.uint8).tobytes())
        elif width == 2:
            writer.writeframes((samples * 32767).astype("<i2").tobytes())
        else:
            whole = (samples * (2**31 - 1)).astype("<i4")
            packed = whole.view(np.uint8).reshape(-1, 4)[:, 4 - width :]
            writer.writeframes(packed.tobytes())
    return file.getvalue()


def asked(path, text="What is this?", kind="image"):
    return [{"role": "user", "content": [{"type": kind, "path": str(path)}, {"type": "text", "text": text}]}]
