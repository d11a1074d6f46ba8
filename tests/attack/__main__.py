"""Run attacks and print the table: `python -m attack [--json FILE] [CLASS...]` in the folder `tests`."""

import argparse
import json
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path

from attack import frame


def main() -> int:
    """The exit status: 1 where an attack broke something."""
    parser = argparse.ArgumentParser(prog="python -m attack", description=__doc__)
    parser.add_argument("groups", nargs="*", metavar="CLASS", help="Run these classes only.")
    parser.add_argument("--json", type=Path, help="Write every result here.")
    parser.add_argument("--list", action="store_true", help="Name the attacks and run none.")
    parser.add_argument("--serve", nargs=3, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    # Whoever ends this ends what it has started, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if chosen.serve:
        module, first, report = chosen.serve
        frame.serve(module, int(first), int(report))
        return 0
    by_module = {name: frame.load([name]) for name in frame.modules()}
    known = {one.group for attacks in by_module.values() for one in attacks}
    if unknown := set(chosen.groups) - known:
        parser.error(f"there is no class {', '.join(sorted(unknown))}; there are {', '.join(sorted(known))}")
    start = time.monotonic()
    results = []
    for name, attacks in by_module.items():
        if chosen.groups and not {one.group for one in attacks} & set(chosen.groups):
            continue
        if chosen.list:
            for one in attacks:
                print(f"{one.group}: {one.name}")
            continue
        for result in frame.run(name, attacks):
            results.append(result)
            print(
                f"{'BROKEN' if result.trouble else 'held  '} {result.seconds:6.2f} s  {result.group}: "
                f"{result.name}{'  ' + result.trouble if result.trouble else ''}",
                flush=True,
            )
    if chosen.list:
        return 0
    print(f"\n{frame.table(results)}\n\n{time.monotonic() - start:.0f} seconds")
    if chosen.json:
        chosen.json.write_text(json.dumps([asdict(result) for result in results], indent=1))
    return int(any(result.trouble for result in results))


if __name__ == "__main__":
    sys.exit(main())
