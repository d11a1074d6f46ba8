"""The shape of a model that a stage starts from, for `plan`: from its folder, or from its own plan."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from trivium.model.config import ExpertsConfig, ModelConfig
from trivium.model.flops import parameter_count
from trivium.model.folder import load_config

Planned = Path | Mapping[str, Any] | None


def shape_of(config: ModelConfig) -> dict[str, Any]:
    """What a plan keeps of a model that is not made yet."""
    return asdict(config)


def size_of(config: ModelConfig) -> dict[str, Any]:
    """What a plan says of a model's size."""
    return {"parameters": parameter_count(config), "vocabulary": config.vocabulary}


def planned_size(parent: Planned) -> dict[str, Any]:
    """The size of a parent that exists, or as much of it as the parent's own plan says."""
    if isinstance(parent, Path):
        config = planned_shape(parent)
        return {} if config is None else size_of(config)
    return {key: parent[key] for key in ("parameters", "vocabulary") if key in parent} if parent else {}


def planned_shape(parent: Planned) -> ModelConfig | None:
    """The config of a parent that exists or is only planned; None where its plan does not know it."""
    if isinstance(parent, Path):
        return load_config(parent) if (parent / "config.json").is_file() else None
    known = None if parent is None else parent.get("model")
    if known is None:
        return None
    experts = known.get("experts")
    return ModelConfig(**{**known, "experts": None if experts is None else ExpertsConfig(**experts)})
