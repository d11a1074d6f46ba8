"""The helper's side: read [pattern, text, whole] as JSON lines, print whether each matches."""

import json
import re
import resource
import sys

_MEMORY = 1 << 30


def main() -> None:
    """Answer until the parent closes the pipe."""
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        pattern, text, whole = json.loads(line)
        try:
            compiled = re.compile(pattern, re.DOTALL if whole else 0)
            answer: bool | str = (compiled.fullmatch if whole else compiled.search)(text) is not None
        except (re.error, OverflowError, RecursionError, MemoryError, TypeError, ValueError) as error:
            answer = str(error) or type(error).__name__
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
