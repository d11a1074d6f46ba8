"""Fuzz for a while: `python -m fuzz [--seconds N] [TARGET...]` in the folder `tests`."""

import argparse
import os
import random
import sys

from fuzz import frame


def main() -> int:
    """The exit status: 1 where an example broke something."""
    parser = argparse.ArgumentParser(prog="python -m fuzz", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="TARGET", help="A part of a target's name.")
    parser.add_argument("--seconds", type=float, default=120.0, help="For all targets together.")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="Targets at a time.")
    parser.add_argument("--seed", type=int, help="Repeat the examples of an earlier run.")
    chosen = parser.parse_args()
    targets = frame.load()
    if chosen.names:
        targets = [one for one in targets if any(name in one.name for name in chosen.names)]
    if not targets:
        parser.error("no target has such a name")
    start = random.getrandbits(32) if chosen.seed is None else chosen.seed
    print(f"{len(targets)} targets, {chosen.seconds:g} seconds, seed {start}", flush=True)
    results = frame.run(targets, chosen.seconds, chosen.workers, start)
    return int(any(result.trouble for result in results))


if __name__ == "__main__":
    sys.exit(main())
