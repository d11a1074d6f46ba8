"""The tensors of a saved state in several files: each process writes its own parts, any layout reads them.

`HuggingFaceStorageReader` of torch.distributed.checkpoint reads the files too, since each file's header says
where its parts begin in that library's form. The library does not write them: its usual form keeps a pickle
(`.metadata`), and its safetensors writer leaves neither checksums nor a mark by which a whole state is told
from one that lacks a file, and needs collectives in the thread that writes.
"""

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trivium.kit.errors import DamagedError
from trivium.kit.files import opened_tensors, save_tensors, tensors_checksum
from trivium.kit.fingerprint import fingerprint
from trivium.learn.holders import Holders, is_divided
from trivium.learn.sharding import extent_of, is_first

OFFSETS = "DCP_SHARDING_INFO"
"""The key of a file's metadata under which stands where each of its parts begins in the whole tensor."""


def file_of(rank: int, size: int) -> str:
    """The file that a process writes."""
    return f"tensors-{rank + 1:05d}-of-{size:05d}.safetensors"


def own_parts(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What this process writes: tensors, and parts of them, that no process of a lower rank has."""
    first, parts = Holders(tensors).first, {}
    for name, tensor in tensors.items():
        if not is_first(tensor, first[name]):
            continue
        part = tensor.detach()
        if is_divided(tensor):
            part = part.to_local()  # type: ignore[attr-defined]
            if 0 in part.shape:
                continue
        parts[name] = part
    return parts


def offsets_of(tensors: Mapping[str, Tensor], parts: Mapping[str, Tensor]) -> dict[str, list[int]]:
    """Where each part begins in its tensor."""
    return {
        name: list(extent_of(tensors[name]).offset) if is_divided(tensors[name]) else [0] * part.dim()
        for name, part in parts.items()
    }


def write_parts(path: Path, parts: dict[str, Tensor], offsets: Mapping[str, list[int]]) -> str:
    """Write a process's file; returns the checksum of its numbers and of where they belong."""
    header = json.dumps({name: {"saved_offsets": offsets[name]} for name in sorted(parts)})
    return fingerprint([save_tensors(path, parts, {OFFSETS: header}), header])


def check_parts(path: Path, expected: str) -> None:
    """Name a file that is not what was written; one tensor at a time is in memory."""
    with opened_tensors(path) as file:
        sums = tensors_checksum((name, file.get_tensor(name)) for name in sorted(file.keys()))
        header = (file.metadata() or {}).get(OFFSETS)
    if expected not in (sums, fingerprint([sums, header])):
        raise DamagedError(f"{path} is damaged: its checksum differs; make or download it again.")


Extents = list[tuple[int, int]]
"""A region of a tensor: in each dimension the first index and the one after the last."""


class _Part(NamedTuple):
    file: Any
    extent: Extents


def _inside(region: Extents, whole: Extents) -> tuple[slice, ...]:
    """A region as slices of a larger one."""
    return tuple(slice(b - first, e - first) for (b, e), (first, _) in zip(region, whole, strict=True))


class SavedTensors(Mapping[str, Tensor]):
    """The tensors of a state by name, read from its files when they are asked for."""

    def __init__(self, paths: Iterable[Path]) -> None:
        self._parts: dict[str, list[_Part]] = defaultdict(list)
        self._open = ExitStack()
        self._places = list(paths)
        for path in self._places:
            file = self._open.enter_context(opened_tensors(path))
            begins = json.loads((file.metadata() or {}).get(OFFSETS, "{}"))
            for name in file.keys():  # noqa: SIM118 (a safetensors file is no dict)
                shape = file.get_slice(name).get_shape()
                offset = begins[name]["saved_offsets"] if begins else [0] * len(shape)
                extent = [(begin, begin + size) for begin, size in zip(offset, shape, strict=True)]
                self._parts[name].append(_Part(file, extent))

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._parts))

    def __len__(self) -> int:
        return len(self._parts)

    def __contains__(self, name: object) -> bool:
        return name in self._parts

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._parts:
            raise KeyError(name)
        shape = self.shape(name)
        return self.region(name, (0,) * len(shape), shape)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a whole tensor."""
        ends = zip(*([end for _, end in part.extent] for part in self._parts[name]), strict=True)
        return tuple(max(end) for end in ends)

    def region(self, name: str, offset: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
        """The numbers of a tensor from `offset` on, in this shape, from whichever files hold them."""
        wanted = [(begin, begin + size) for begin, size in zip(offset, shape, strict=True)]
        found: Tensor | None = None
        filled = 0
        for file, extent in self._parts[name]:
            common = [
                (max(begin, first), min(end, last))
                for (begin, end), (first, last) in zip(wanted, extent, strict=True)
            ]
            if any(begin >= end for begin, end in common):
                continue
            part: Tensor = file.get_slice(name)[_inside(common, extent)]
            if part.shape == shape:
                return part
            found = part.new_empty(shape) if found is None else found
            found[_inside(common, wanted)] = part
            filled += part.numel()
        if found is None or filled != prod(shape):
            raise DamagedError(f"{self._places[0].parent} holds {name} in part; remove that folder.")
        return found

    def like(self, name: str, other: Tensor) -> Tensor:
        """A tensor as this process holds another one: its own part alone where that is divided."""
        if not is_divided(other) or self.shape(name) != other.shape:
            return self[name]
        from torch.distributed.tensor import DTensor

        assert isinstance(other, DTensor)
        extent = extent_of(other)
        # Where there are fewer rows than processes, some of them hold none.
        empty = torch.empty(extent.shape, dtype=other.dtype)
        local = self.region(name, extent.offset, extent.shape) if empty.numel() else empty
        return DTensor.from_local(
            local.to(other.device), other.device_mesh, other.placements, run_check=False,
            shape=other.shape, stride=other.stride(),
        )  # fmt: skip


class Held(Mapping[str, Tensor]):
    """The saved tensors under a prefix, each as this process holds the one of its name in `like`."""

    def __init__(self, saved: SavedTensors, prefix: str, like: Mapping[str, Tensor]) -> None:
        self._saved, self._prefix, self._like = saved, prefix, like

    def __iter__(self) -> Iterator[str]:
        return (one.removeprefix(self._prefix) for one in self._saved if one.startswith(self._prefix))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __getitem__(self, name: str) -> Tensor:
        whole = f"{self._prefix}{name}"
        return self._saved.like(whole, self._like[name]) if name in self._like else self._saved[whole]
