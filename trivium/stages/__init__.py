"""The stages, one file per kind: a new file in this folder is a new kind, with nothing to register."""

from importlib import import_module
from pkgutil import iter_modules

from trivium.stages.parts.stage import Stage


def kinds() -> dict[str, type[Stage]]:
    """Every kind of stage a recipe can name."""
    for module in iter_modules(__path__):
        import_module(f"{__name__}.{module.name}")
    return dict(Stage.kinds)
