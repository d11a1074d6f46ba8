"""llama.cpp as a contestant of `generate.py`: greedy answers to one or several prompts, when it is asked."""

from __future__ import annotations

import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any


def main() -> None:
    """Open the file that the arguments name, and answer every line on standard input."""
    arguments = json.loads(sys.argv[1])
    answers_to, quiet = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    # The library logs to both; only the answers belong on standard output.
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    import xllamacpp

    rows = arguments["rows"]
    settings = xllamacpp.CommonParams()
    settings.model.path = arguments["file"]
    settings.n_ctx, settings.n_parallel, settings.n_gpu_layers, settings.warmup = 512 * rows, rows, 0, True
    settings.cpuparams.n_threads = arguments["threads"]
    server = xllamacpp.Server(settings)

    def answered(prompt: list[int], new_tokens: int) -> int:
        request: dict[str, Any] = {
            "prompt": prompt, "n_predict": new_tokens, "temperature": 0.0, "top_k": 1, "ignore_eos": True,
            "cache_prompt": False,
        }  # fmt: skip
        return int(server.handle_completions(request)["usage"]["completion_tokens"])

    os.write(answers_to, b'ANSWER {"ready": true}\n')
    for line in sys.stdin:
        asked = json.loads(line)
        start = time.perf_counter()
        with ThreadPoolExecutor(rows) as threads:
            wanted = [asked["new_tokens"]] * len(asked["prompts"])
            tokens = sum(threads.map(answered, asked["prompts"], wanted))
        found = {"seconds": time.perf_counter() - start, "tokens": tokens}
        os.write(answers_to, f"ANSWER {json.dumps(found)}\n".encode())


if __name__ == "__main__":
    main()
