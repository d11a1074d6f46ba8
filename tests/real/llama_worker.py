"""llama.cpp by itself: python llama_worker.py FILE < {"prompts": [[ids]], "new_tokens": n} > [[ids]]."""

import json
import os
import sys


def main() -> None:
    """Answer every prompt greedily."""
    answers_to, quiet = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    # The library logs to both; only the answers belong on standard output.
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    import xllamacpp

    asked = json.load(sys.stdin)
    settings = xllamacpp.CommonParams()
    settings.model.path = sys.argv[1]
    settings.n_ctx, settings.n_parallel, settings.n_gpu_layers, settings.warmup = 1024, 1, 0, False
    settings.cpuparams.n_threads = 2
    server = xllamacpp.Server(settings)
    answers = []
    for prompt in asked["prompts"]:
        request = {
            "prompt": prompt, "n_predict": asked["new_tokens"], "temperature": 0.0, "top_k": 1,
            "cache_prompt": False, "n_probs": 2,
        }  # fmt: skip
        [choice] = server.handle_completions(request)["choices"]
        answers.append(
            [
                [[one["id"], one["logprob"]] for one in place["top_logprobs"]]
                for place in choice["logprobs"]["content"]
            ]
        )
    os.write(answers_to, json.dumps(answers).encode())


main()
