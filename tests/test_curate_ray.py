"""The same curation on a Ray cluster of this machine; where Ray is not installed, one sentence says so."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
from curating import curation

from trivium.data.sources import Source
from trivium.kit.errors import TriviumError

STEPS = [
    {"deduplicate": "exact"},
    {"deduplicate": {"method": "minhash", "threshold": 0.55, "bands": 28, "rows": 4, "shingle": 2}},
    {"deduplicate": {"method": "lines", "most": 1, "characters": 10}},
    {"deduplicate": {"method": "substrings", "words": 8}},
    {"sample": 0.9},
]


def content(folder: Path, engine: str) -> dict[str, bytes]:
    sources = [Source(path="world:web", limit=200)]
    curation(folder, sources, STEPS, shard_bytes=1 << 13, engine=engine).run()
    files = [*folder.glob("data/*"), *folder.glob("dropped/*"), folder / "funnel.json"]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.mark.slow
def test_ray_writes_the_same_bytes(tmp_path: Path) -> None:
    if find_spec("ray") is None:
        with pytest.raises(TriviumError, match=r"needs Ray: pip install 'trivium\[ray\]'"):
            content(tmp_path / "ray", "ray")
    else:
        assert content(tmp_path / "ray", "ray") == content(tmp_path / "local", "local")
