"""What drafts save: one engine with and one without, on the same requests, in turns, in one run.

Run with `python benchmarks/speculative.py --smol FOLDER --draft FOLDER`:

- look-ups: SmolLM2-135M-Instruct rewrites word problems in the manner of GSM8K (made up here), so that most
  of its answer stands in the prompt;
- a draft model: `--draft` (a stage of the laptop's road) drafts for a target of eight times its size, which
  is the draft grown by width and identity blocks with a little noise, and trained on for `--tokens` tokens.
  Both continue texts of the invented world.

Every answer is compared: greedy ones must be the same with and without drafts. The plain engine holds one
row, as a chat does, and so computes a row in the fastest way it has.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch

import trivium
from trivium.generate.requests import Request
from trivium.generate.sampling import Sampling
from trivium.serve.models import open_engine
from trivium.world import documents

PEOPLE = ["Ada", "Boris", "Chloe", "Dmitri", "Elena", "Farid", "Greta", "Hugo", "Irene", "Jonas"]
PROBLEMS = [
    "{0} bakes {1} loaves on Monday and twice as many on Tuesday. Each loaf is sold for $3. How much money "
    "does {0} take in on both days together?",
    "{0} walks {1} minutes to the harbour every morning and takes the ferry back, which needs half the time. "
    "How many minutes is {0} on the way in a week of five days?",
    "A shelf holds {1} jars. {0} fills a third of them with honey and the rest with plum jam, and gives 4 "
    "jars of jam away. How many jars of jam does {0} keep?",
    "{0} plants {1} tulips in rows of 6. In every row 2 tulips are red and the others are yellow. How many "
    "yellow tulips has {0} planted?",
]
ASKED = "Rewrite the problem with the name Maria. Keep every other word.\n\n{0}"
SHOWN = [
    "Omar buys 4 pens for $2 each and pays with a note of $20. How much money does Omar get back?",
    "Lena reads 15 pages a day. After how many days has Lena read a book of 90 pages?",
]


def rewriting(problem: str) -> list[dict[str, str]]:
    """A request to rewrite a problem after two that were answered: without them a small model solves it."""
    messages = []
    for shown in SHOWN:
        answer = shown.replace("Omar", "Maria").replace("Lena", "Maria")
        messages += [
            {"role": "user", "content": ASKED.format(shown)}, {"role": "assistant", "content": answer},
        ]  # fmt: skip
    return [*messages, {"role": "user", "content": ASKED.format(problem)}]


def problems(count: int) -> list[str]:
    """Word problems with names and numbers of their own."""
    return [PROBLEMS[i % len(PROBLEMS)].format(PEOPLE[i % len(PEOPLE)], 12 + 6 * i) for i in range(count)]


def grown(draft: str, tokens: int, folder: Path) -> str:
    """A target of about eight times the draft's size: the draft grown and trained on."""
    recipe = f"""
name: grown
stages:
  large:
    kind: grow
    from: {draft}
    layers: 12
    width: 256
    heads: 8
    inner_width: 768
    noise: 0.02
    exact: false
  target:
    kind: sft
    from: large
    data: {{world:chat: {{limit: 2k}}}}
    context: 256
    batch: 2k
    tokens: {tokens}
"""
    (folder / "grown.yaml").write_text(recipe)
    trivium.run(folder / "grown.yaml", runs=folder / "runs")
    return str(folder / "runs" / "grown" / "target" / "model")


def compare(
    name: str, target: str, draft: str, prompts: list[list[int]], aim: float, asked: argparse.Namespace
) -> None:
    """Print how much sooner the same answers come with a draft."""
    engines = {
        "plain": open_engine(target, max_rows=1),
        "drafts": open_engine(target, max_rows=1, draft=draft),
    }
    length, rounds = asked.length, asked.rounds
    for temperature in asked.temperatures:
        sampling = Sampling(temperature=temperature, seed=1, max_new_tokens=length, stop_ids=())
        requests = [Request(prompt, sampling) for prompt in prompts]
        found, ratios = {}, []
        before = dict(engines["drafts"].counts)
        for turn in range(rounds + 1):
            times = {}
            for kind in ("plain", "drafts") if turn % 2 else ("drafts", "plain"):
                began = time.perf_counter()
                found[kind] = [samples[0].tokens for samples in engines[kind].generate(requests)]
                times[kind] = time.perf_counter() - began
            if turn:  # the first turn lays out buffers and learns what pays
                ratios.append(times["plain"] / times["drafts"])
        counts = {key: value - before[key] for key, value in engines["drafts"].counts.items()}
        tokens = sum(map(len, found["plain"]))
        same = sum(one == other for one, other in zip(found["plain"], found["drafts"], strict=True))
        print(
            f"{name}, temperature {temperature:g}: {statistics.median(ratios):.2f} x "
            f"({min(ratios):.2f} to {max(ratios):.2f}), aim {aim} x at 0; "
            f"{tokens / times['plain']:.1f} tokens/s plain; accepted {counts['accepted_tokens']} of "
            f"{counts['drafted_tokens']}, {counts['generated_tokens'] / counts['steps']:.2f} tokens a step; "
            f"{same}/{len(prompts)} answers equal; drafting: {engines['drafts'].drafting}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smol", help="SmolLM2-135M-Instruct as a folder")
    parser.add_argument("--draft", help="a chat model of the laptop family, as a folder")
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=40_000, help="that the grown target is trained on")
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 1.0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.smol:
        tokenizer = trivium.load(arguments.smol).tokenizer
        asked = [rewriting(one) for one in problems(arguments.prompts)]
        prompts = [tokenizer.encode_prompt(one) for one in asked]
        compare("look-up, SmolLM2", arguments.smol, "lookup", prompts, 1.3, arguments)
    if arguments.draft:
        with tempfile.TemporaryDirectory() as folder:
            target = grown(arguments.draft, arguments.tokens, Path(folder))
            models = [trivium.load(place) for place in (target, arguments.draft)]
            sizes = [sum(one.numel() for one in model.transformer.parameters()) / 1e6 for model in models]
            tokenizer = models[0].tokenizer
            texts = [one.text or "" for one in documents("prose", split="test", limit=arguments.prompts)]
            prompts = [tokenizer.encode(text)[:24] for text in texts]
            name = f"draft of {sizes[1]:.1f}M for {sizes[0]:.1f}M"
            compare(name, target, arguments.draft, prompts, 1.5, arguments)


if __name__ == "__main__":
    main()
