"""How much of a device a training step uses: its arithmetic and its memory."""

import torch

from trivium.kit.machine import peak_products


def utilisation(
    device: torch.device, dtype: torch.dtype | None, flops: float, seconds: float
) -> dict[str, float]:
    """What to log of a step in which one device did so many FLOPs.

    `mfu` (model FLOPs utilisation; PaLM, 2022) is the share of the maker's figure for products of this type,
    with attention counted as the whole square; it is left out where that figure is not known, and where
    products are of several types. `memory_bytes` is the most that torch has held on the device since the
    stage began. A processor has neither.
    """
    if device.type != "cuda":
        return {}
    found: dict[str, float] = {"memory_bytes": torch.cuda.max_memory_reserved(device)}
    peak = None if dtype is None else peak_products(torch.cuda.get_device_name(device), dtype)
    if peak is not None and seconds > 0:
        found["mfu"] = round(flops / seconds / peak, 4)
    return found
