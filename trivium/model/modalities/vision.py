"""The vision encoder: square pictures to patches, patches to states (ViT, Dosovitskiy et al. 2021)."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trivium.model.arithmetic import note_module
from trivium.model.modalities.encoder import Encoder, EncoderConfig

HALF = (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class VisionConfig:
    """A vision encoder: our own, or the layers of CLIP or SigLIP that are used."""

    encoder: EncoderConfig
    side: int
    patch: int
    patch_bias: bool = True
    with_class: bool = False
    """CLIP puts a learned row before the patches."""
    drop_first: bool = False
    """Whether the first row is no token."""
    mean: tuple[float, float, float] = HALF
    deviation: tuple[float, float, float] = HALF

    @property
    def patches(self) -> int:
        return (self.side // self.patch) ** 2

    @property
    def rows(self) -> int:
        """The states that come out of a picture."""
        return self.patches + self.with_class - self.drop_first


class VisionEncoder(nn.Module):
    """Pixels to one state for each patch."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        width = config.encoder.width
        # A convolution whose stride is its size is a product with every patch laid flat.
        self.patches = nn.Linear(3 * config.patch**2, width, bias=config.patch_bias)
        self.position_embedding = nn.Parameter(torch.zeros(config.patches + config.with_class, width))
        self.class_embedding = nn.Parameter(torch.zeros(width)) if config.with_class else None
        self.encoder = Encoder(config.encoder)

    def normalised(self, tiles: Tensor) -> Tensor:
        """Pixels, uint8 [tiles, side, side, 3], as the encoder's numbers, [tiles, 3, side, side]."""
        kind = self.patches.weight.dtype
        mean, deviation = (
            torch.tensor(part, device=tiles.device) for part in (self.config.mean, self.config.deviation)
        )
        return ((tiles.float() / 255 - mean) / deviation).permute(0, 3, 1, 2).to(kind)

    def forward(self, tiles: Tensor) -> Tensor:
        """States of pictures, uint8 [tiles, side, side, 3] -> [tiles, rows, width]."""
        pixels, patch = self.normalised(tiles), self.config.patch
        across = self.config.side // patch
        flat = pixels.unflatten(3, (across, patch)).unflatten(2, (across, patch))
        # [tiles, 3, down, patch, across, patch] -> [tiles, patches, 3 × patch × patch]
        rows = flat.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        note_module(self.patches, rows)
        stream = self.patches(rows)
        if self.class_embedding is not None:
            first = self.class_embedding.expand(len(stream), 1, -1)
            stream = torch.cat([first, stream], dim=1)
        states = self.encoder(stream + self.position_embedding)
        return states[:, 1:] if self.config.drop_first else states
