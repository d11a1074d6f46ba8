"""The helper's side: read pairs of answers as JSON lines, print a verdict for each."""

import json
import resource
import sys

_MEMORY = 4 << 30


def main() -> None:
    """Answer until the parent closes the pipe."""
    sys.path[:] = json.loads(sys.argv[1])
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    from math_verify import LatexExtractionConfig, parse, verify

    settings = [LatexExtractionConfig(boxed_match_priority=0)]

    def read(text: str) -> list[object]:
        parsed: list[object] = parse(
            f"\\boxed{{{text}}}",
            extraction_config=settings,
            fallback_mode="no_fallback",
            parsing_timeout=None,
        )
        return parsed

    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        gold, answer = json.loads(line)
        try:
            wanted = read(gold)
            given = read(answer)
            if not wanted:
                verdict = "gold_bad"
            elif not given:
                verdict = "unparsed"
            else:
                verdict = "ok" if verify(wanted, given, timeout_seconds=None) else "wrong"
        except (MemoryError, RecursionError):
            verdict = "timeout"
        except Exception:
            verdict = "unparsed"
        print(json.dumps(verdict), flush=True)


if __name__ == "__main__":
    main()
