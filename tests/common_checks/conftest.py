"""What all checks of this folder share: the tables, and inputs that are made once."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from benches import Bench


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """Runs of single stages over inputs that are made once; equal settings are run once."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield Bench(tmp_path_factory.mktemp("tiny"))
    torch.set_num_threads(threads)
