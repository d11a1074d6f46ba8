"""The code that made a result, as one checksum for each part of the package that a result can depend on."""

import hashlib
from functools import cache
from pathlib import Path

PARTS = (
    "kit", "tokens", "world", "data", "model", "curate", "learn", "generate", "grade", "evals",
    "synthesize", "stages", "recipe",
)  # fmt: skip
_PACKAGE = Path(__file__).parent.parent


@cache
def package_code() -> dict[str, str]:
    """For every part of the package a checksum of its files, in the order of the layers."""
    return {part: _checksum(_PACKAGE / part) for part in PARTS if (_PACKAGE / part).is_dir()}


def _checksum(folder: Path) -> str:
    digest = hashlib.blake2b(digest_size=6)
    # Words beside the code decide as it does; recipes of the library have fingerprints of their own.
    read = (path for path in folder.rglob("*") if path.suffix in (".py", ".yaml", ".jinja"))
    for path in sorted(path for path in read if "library" not in path.relative_to(folder).parts):
        digest.update(f"{path.relative_to(folder).as_posix()}\n".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()
