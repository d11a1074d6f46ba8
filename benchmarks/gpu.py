"""Training, decoding and RL on one GPU beside transformers and TRL: a dated table in at most nine minutes.

python benchmarks/gpu.py                      # every row, into benchmarks/results/
python benchmarks/gpu.py --only train-350M    # some rows
python benchmarks/gpu.py --tiny --device cpu  # toy shapes, to prove the code where there is no GPU
python benchmarks/gpu.py --list               # the table with nothing measured: what a GPU would be asked
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
LIMIT = 9 * 60 - 10
"""Seconds for all rows; what is left is for the table."""
LIBRARIES = ("torch", "triton", "transformers", "trl", "peft", "numpy")
SHAPES = {
    "124M": {"layers": 12, "width": 768, "heads": 12, "key_heads": 12, "inner": 2048},
    "350M": {"layers": 24, "width": 1024, "heads": 16, "key_heads": 16, "inner": 2816},
    "1B": {"layers": 16, "width": 2048, "heads": 32, "key_heads": 8, "inner": 8192},
}
TOY = {"layers": 2, "width": 64, "heads": 4, "key_heads": 2, "inner": 96, "vocabulary": 320}


@dataclass
class Row:
    """One job: the script that does it, what it is told, and the seconds it may take."""

    name: str
    job: str
    script: str
    arguments: dict[str, Any]
    seconds: float
    requests: list[dict[str, Any]] = field(default_factory=list)
    """Lines on standard input, for scripts that wait for their turn."""
    contestant: str = ""
    """What a script that does not name its own answers is called."""
    unit: str = "tokens_per_second"
    target: str = ""


@dataclass
class Result:
    """What became of a row: an answer for every contestant, and what cut it short."""

    row: Row
    answers: list[dict[str, Any]] = field(default_factory=list)
    trouble: str = ""


def shape_of(name: str, context: int, tiny: bool) -> dict[str, int]:
    """A shape with its vocabulary and context; every shape is the same toy where the code is only proved."""
    if tiny:
        return {**TOY, "context": min(context, 512)}
    return {**SHAPES[name], "vocabulary": 32768, "context": context}


def training(tiny: bool) -> list[Row]:
    """The rows about training."""
    adamw = ["Trivium compiled AdamW", "transformers compiled"]
    contestants = {
        "124M": ["Trivium eager AdamW", *adamw],
        "350M": [*adamw, "Trivium compiled sized AdamW", "Trivium compiled Muon", "Trivium eager AdamW"],
        "1B": [*adamw, "Trivium compiled float8 AdamW"],
    }
    if tiny:
        contestants = {name: ["Trivium eager Muon", "transformers eager"] for name in contestants}
        contestants["1B"].append("Trivium eager float8 AdamW")
    targets = {
        "124M": "1.4 x transformers compiled",
        "350M": "190k tokens/s, 1.5 x",
        "1B": "55 % MFU, 1.25 x; float8 1.1 x bfloat16",
    }
    rows = [
        Row(
            f"train-{name}", f"train {name}, 131k-token steps", "gpu_worker.py",
            {
                "kind": "train", "shape": shape_of(name, 2048, tiny), "contestants": contestants[name],
                "tokens": 1024 if tiny else 131_072, "pass": 512 if tiny else 32_768,
                "peer_pass": 512 if tiny else 16_384, "seconds": 0.1 if tiny else 4.0,
            },
            130, target=targets[name],
        )
        for name in ("350M", "1B", "124M")
    ]  # fmt: skip
    for name, job, context, typical, target in (
        ("train-packed", "train 350M, packed documents of about 500 tokens", 2048, 500, ""),
        ("train-long", "train 350M, documents of 32k tokens", 32_768, None, "1.3 x transformers"),
    ):
        shape = shape_of("350M", context, tiny)
        tokens = 2 * shape["context"] if tiny else 131_072
        if tiny and typical is not None:
            typical = 60
        few = ["Trivium eager AdamW"] if tiny else ["Trivium compiled AdamW", "Trivium eager AdamW"]
        if typical is None:
            few.append("transformers eager")
        rows.append(
            Row(
                name, job, "gpu_worker.py",
                {
                    "kind": "train", "shape": shape, "contestants": few, "tokens": tokens,
                    "pass": 512 if tiny else 32_768, "peer_pass": 512 if tiny else 32_768,
                    "seconds": 0.1 if tiny else 3.0, "documents": typical,
                },
                75, target=target,
            )
        )  # fmt: skip
    return rows


def decoding(tiny: bool) -> list[Row]:
    """The rows about the engine."""
    targets = {"350M": "1,200 / 20k / 45k at 1 / 32 / 256 rows", "1B": "1,000 / 21k / 60k"}
    rows = [
        Row(
            f"decode-{name}", f"decode {name}, 512 tokens of context", "gpu_worker.py",
            {
                "kind": "decode", "shape": shape_of(name, 1024, tiny),
                "rows": [1, 2] if tiny else [1, 32, 256],
                "prompt": 24 if tiny else 448, "new": 12 if tiny else 128, "peer_new": 12 if tiny else 48,
                "seconds": 1.0 if tiny else 5.0,
            },
            70, target=targets[name],
        )
        for name in ("350M", "1B")
    ]  # fmt: skip
    rows.append(
        Row(
            "first-token", "first token of a 1,000-token prompt, 1B", "gpu_worker.py",
            {"kind": "first_token", "shape": shape_of("1B", 2048, tiny), "prompt": 100 if tiny else 1000},
            30, unit="ms", target="30 ms",
        )
    )  # fmt: skip
    rows.append(
        Row(
            "mixed", "64 mixed requests, 350M", "gpu_worker.py",
            {
                "kind": "mixed", "shape": shape_of("350M", 1024, tiny), "requests": 4 if tiny else 64,
                "prompts": [5, 40] if tiny else [32, 512], "answers": [4, 12] if tiny else [32, 256],
            },
            60, target="10 x transformers",
        )
    )  # fmt: skip
    rows.append(
        Row(
            "greedy", "greedy text in float32, 124M, as transformers'", "gpu_worker.py",
            {"kind": "greedy", "shape": shape_of("124M", 1024, tiny), "new": 8 if tiny else 48},
            40, unit="equal", target="all equal",
        )
    )  # fmt: skip
    return rows


def tuning(tiny: bool) -> list[Row]:
    """The rows beside TRL: the workers of the benchmarks on a CPU, told to use the GPU."""
    shape = {key: value for key, value in shape_of("350M", 1024, tiny).items() if key != "key_heads"}
    shape["vocabulary"] = 320 if tiny else 4096
    few = 40 if tiny else 2000
    rows = []
    for name in ("Trivium", "TRL packed"):
        batch = (2 if tiny else 64) if name == "Trivium" else (1 if tiny else 16)
        wishes = {"rows": few, "longest": 256 if tiny else 1024, "batch": batch, "adapter": False}
        rows.append(
            Row(
                f"sft-{name.split()[0]}", "SFT 350M, packed", "sft_worker.py",
                {"shape": shape, "contestant": name, **wishes}, 45, [{"steps": 1 if tiny else 4}], name,
                target="2 x TRL packed",
            )
        )  # fmt: skip
    for name in ("Trivium", "TRL"):
        wishes = {"pairs": few, "batch": 2 if tiny else 16, "adapter": False, "stored": True}
        rows.append(
            Row(
                f"dpo-{name}", "DPO 350M", "dpo_worker.py",
                {"shape": shape, "contestant": name, **wishes}, 45,
                [{"pairs": 2 if tiny else 64}], name, "pairs_per_second", "2 x TRL",
            )
        )  # fmt: skip
    for name in ("Trivium", "TRL"):
        wishes = {
            "answers": 4 if tiny else 256, "group": 2 if tiny else 8, "longest": 8 if tiny else 256,
            "batch": 4 if tiny else 64, "early": False,
        }  # fmt: skip
        rows.append(
            Row(
                f"grpo-{name}", "GRPO 350M, 256 answers of 256 tokens", "rl_worker.py",
                {"shape": shape, "contestant": name, **wishes}, 70, [{"steps": 1}], name,
                "rollouts_per_second", "5 x TRL, 40 GiB",
            )
        )  # fmt: skip
    return rows


def every_row(tiny: bool) -> list[Row]:
    """All rows, in the order in which they are missed most."""
    train, decode, tune = training(tiny), decoding(tiny), tuning(tiny)
    return [train[0], decode[0], *tune[4:], train[1], decode[1], *tune[:4], *decode[2:], *train[2:]]


def run(row: Row, device: str, threads: int, seconds: float) -> Result:
    """Do one row in its own process, within so many seconds; what it had said by then counts."""
    arguments = {**row.arguments, "device": device, "threads": threads}
    command = [sys.executable, str(HERE / row.script), json.dumps(arguments)]
    lines = "".join(json.dumps(one) + "\n" for one in row.requests)
    result = Result(row)
    try:
        done = subprocess.run(
            command, input=lines, capture_output=True, text=True, timeout=seconds, check=False
        )
        said, errors = done.stdout, done.stderr
        if done.returncode:
            result.trouble = (errors.strip().splitlines() or ["it ended early"])[-1][:160]
    except subprocess.TimeoutExpired as late:
        said = late.stdout.decode() if isinstance(late.stdout, bytes) else late.stdout or ""
        result.trouble = f"not done within {seconds:.0f} s"
    found = [line.removeprefix("ANSWER ") for line in said.splitlines() if line.startswith("ANSWER ")]
    answers = [json.loads(line) for line in found]
    result.answers = [{"name": row.contestant, **one} for one in answers if not one.get("ready")]
    return result


def flops_per_token(shape: dict[str, int], context: int) -> tuple[float, float]:
    """Training FLOPs of a token: six times the matrices, and attention counted causally or in full."""
    width, head = shape["width"], shape["width"] // shape["heads"]
    layer = 2 * width * width + 2 * width * shape["key_heads"] * head + 3 * width * shape["inner"]
    matrices = shape["layers"] * layer + shape["vocabulary"] * width
    attention = 6 * shape["layers"] * width * context
    return 6 * matrices + attention, 6 * matrices + 2 * attention


def told(result: Result, one: dict[str, Any], peak: float | None) -> str:
    """One contestant's figures in a cell."""
    if "failed" in one:
        return str(one["failed"])
    unit, row = result.row.unit, result.row
    if unit == "equal":
        return f"{one['equal']} of {one['of']}"
    if unit == "ms":
        return f"{one['ms']:.1f} ms"
    shown = f"{one[unit]:,.0f}" if one[unit] >= 100 else f"{one[unit]:.1f}"
    if peak is not None and row.arguments.get("kind") == "train" and not row.arguments.get("documents"):
        causal, whole = (
            one[unit] * flops / peak
            for flops in flops_per_token(row.arguments["shape"], row.arguments["shape"]["context"])
        )
        shown += f" (MFU {causal:.1%} causal, {whole:.1%} full)"
    if "step_ms" in one:
        shown += f", {one['step_ms']:.1f} ms a step"
    if "peak_gib" in one:
        shown += f", {one['peak_gib']:.0f} GiB"
    return shown


def table(results: list[Result], peak: float | None) -> list[str]:
    """The table in markdown, a line for every contestant."""
    lines = ["| job | contestant | measured | unit | wanted |", "|---|---|---|---|---|"]
    for result in results:
        row = result.row
        for one in result.answers:
            cell = told(result, one, peak)
            lines.append(
                f"| {row.job} | {one['name']} | {cell} | {row.unit.replace('_', ' ')} | {row.target} |"
            )
        if result.trouble:
            names = row.contestant or ", ".join(row.arguments.get("contestants", ()))
            lines.append(f"| {row.job} | {names} | not measured: {result.trouble} | | {row.target} |")
    return lines


def facts(device: str, seconds: float) -> dict[str, str]:
    """When, what and where: enough to measure it again."""
    import torch

    def of(name: str) -> str:
        try:
            return version(name)
        except PackageNotFoundError:
            return "not installed"

    asked = ["git", "-C", str(HERE), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        commit = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        commit = ""
    named = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": commit or "unknown: no git here",
        "device": named,
        "cuda": str(torch.version.cuda) if device == "cuda" else "none",
        "python": platform.python_version(),
        **{name: of(name) for name in LIBRARIES},
        "seconds": f"{seconds:.0f}",
    }


def main(say: Callable[[str], None] = print) -> int:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="toy shapes: figures mean nothing")
    parser.add_argument("--list", action="store_true", help="every row as not measured; needs no GPU")
    parser.add_argument("--only", action="append", default=[], help="the rows whose names begin so")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds for all rows")
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--to", type=Path, help="the folder for the table; benchmarks/results unless --tiny")
    wishes = parser.parse_args()
    if wishes.list:
        nothing = [Result(row, trouble="no GPU was at hand") for row in every_row(tiny=False)]
        say("\n".join(table(nothing, None)))
        return 0
    import torch

    from trivium.kit.machine import peak_products

    if wishes.device == "cuda" and not torch.cuda.is_available():
        print(
            "benchmarks/gpu.py: this machine has no CUDA device; add --tiny --device cpu to try the code.",
            file=sys.stderr,
        )
        return 2
    if wishes.device == "cpu" and not wishes.tiny:
        print("benchmarks/gpu.py: on a CPU these shapes would take days; add --tiny.", file=sys.stderr)
        return 2
    start = time.monotonic()
    results: list[Result] = []
    for row in every_row(wishes.tiny):
        if wishes.only and not any(row.name.startswith(name) for name in wishes.only):
            continue
        left = wishes.limit - (time.monotonic() - start)
        if left < 10:
            results.append(Result(row, trouble="no time was left"))
            continue
        results.append(
            run(row, wishes.device, wishes.threads, min(left, row.seconds if not wishes.tiny else left))
        )
        for one in results[-1].answers:
            say(f"{row.name:14s} {one['name']:26s} {told(results[-1], one, None)}")
        if results[-1].trouble:
            say(f"{row.name:14s} {row.contestant:26s} {results[-1].trouble}")
    known = facts(wishes.device, time.monotonic() - start)
    text = [f"# One GPU: {known['device']}", "", *(f"- {name}: {value}" for name, value in known.items()), ""]
    if wishes.tiny:
        text += ["Toy shapes: these figures prove that the rows run, and nothing else.", ""]
    text += table(results, peak_products(known["device"], torch.bfloat16))
    folder = wishes.to or (None if wishes.tiny else HERE / "results")
    if folder is None:
        say("\n".join(text))
    else:
        folder.mkdir(parents=True, exist_ok=True)
        slug = "-".join(known["device"].lower().split())
        path = folder / f"gpu-{known['date'][:10]}-{slug}.md"
        path.write_text("\n".join(text) + "\n", encoding="utf-8")
        say(f"Wrote {path}.")
    return 1 if any(result.trouble and not result.answers for result in results) and wishes.tiny else 0


if __name__ == "__main__":
    sys.exit(main())
