"""One thread a test, so that two test processes share two cores; and nothing is ever downloaded."""

import gc
import os
import shutil
import zlib
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# How fast examples are drawn and run depends on what else this machine does
settings.register_profile("any speed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any speed")

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
# what a probe found is not taken over from a run of other code
os.environ["TRIVIUM_CACHE"] = ""

# Every file is synced to the disk before it takes its name, which is half the time of a small training.
# In memory that costs nothing, and what a killed process leaves is the same.
IN_MEMORY = Path("/dev/shm")
ROOM = 4 << 30
if IN_MEMORY.is_dir() and os.access(IN_MEMORY, os.W_OK) and shutil.disk_usage(IN_MEMORY).free > ROOM:
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(IN_MEMORY))


def pytest_collection_finish() -> None:
    """What is imported stays: the collector of garbage need not look through it again and again."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Among several processes, files with slow tests come first, so that no long one is left for the end.

    Neighbours in the alphabet wait for the same things (a server, a lease), so their order is that of a hash.
    """
    leave_most_cases_to_the_whole_suite(items)
    if hasattr(config, "workerinput"):
        slow = {item.path for item in items if item.get_closest_marker("slow")}
        items.sort(key=lambda item: (item.path not in slow, zlib.crc32(item.path.name.encode())))


def leave_most_cases_to_the_whole_suite(items: list[pytest.Item]) -> None:
    """Mark as slow all but `count` cases, evenly spaced, of a test marked `quick_cases(count)`."""
    cases: dict[str, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("quick_cases") and not item.get_closest_marker("slow"):
            cases.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for of_one_test in cases.values():
        mark, total = of_one_test[0].get_closest_marker("quick_cases"), len(of_one_test)
        count = min(mark.args[0], total)
        quick = {place * total // count for place in range(count)}
        for place, item in enumerate(of_one_test):
            if place not in quick:
                item.add_marker(pytest.mark.slow)
