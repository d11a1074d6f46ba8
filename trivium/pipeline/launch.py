"""Scripts that run a recipe under torchrun, SLURM, SkyPilot or Ray: rendered from `scripts/`, and submitted.

torchrun starts the processes, and all of them again when one fails; a scheduler starts torchrun again. The
run itself stops at a saved state before a time limit, and the command is always the same: it begins, goes on,
or finds everything complete.
"""

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import jinja2

from trivium.kit.errors import TriviumError
from trivium.kit.stopping import GO_ON_STATUS, seconds
from trivium.recipe.schema import load

TARGETS = ("torchrun", "slurm", "sky", "ray")
FIRST_PORT = 20_000
"""Below those that the system gives to clients."""
MOUNTED = "/trivium-runs"
"""Where a bucket or a volume lies on a machine of SkyPilot's."""


@dataclass(frozen=True)
class Machines:
    """What is asked of a scheduler."""

    nodes: int = 1
    processes: int = 8
    """On each machine; one GPU each."""
    cpus: int = 8
    """Processor cores for each process."""
    gpus: bool = True
    jobs: int | None = None
    """Tasks of a SLURM array, which share the stages of the recipe."""
    time: str = "24:00:00"
    """The time limit of a SLURM job."""
    grace: str = "5m"
    """So long before the limit the run saves and stops."""
    restarts: int = 3
    """How often torchrun starts all processes again after one of them failed."""
    directives: tuple[str, ...] = ()
    """More options of sbatch, such as `--partition=gpu`."""
    accelerator: str = "H100"
    """The GPU that SkyPilot looks for."""
    bucket: str | None = None
    """A bucket in which SkyPilot keeps the runs of one machine."""
    volume: str | None = None
    """A volume of SkyPilot's that all machines see."""


def script(
    recipe: str,
    target: str,
    runs: str | Path,
    nodes: int = 1,
    processes: int = 8,
    jobs: int | None = None,
    more: Iterable[str] = (),
    **wishes: object,
) -> str:
    """The script that runs a recipe on a target; `wishes` are the other fields of `Machines`.

    With `jobs`, a SLURM array of so many tasks instead, each with `processes` GPUs, which share the stages.
    `more` are further words for `trivium run`.
    """
    asked = Machines(nodes=nodes, processes=processes, jobs=jobs, **wishes)  # type: ignore[arg-type]
    _check(target, asked)
    if target == "sky" and (asked.bucket or asked.volume):
        runs = MOUNTED
    if target == "ray":
        # A job's working folder is a copy that goes with it.
        runs = Path(runs).absolute()
    name = load(recipe).name
    command = shlex.join(["run", recipe, "--runs", str(runs), *more])
    limit, grace = (seconds(asked.time), seconds(asked.grace)) if target == "slurm" else (0, 0)
    return _templates().get_template(f"{target}.jinja").render(
        asked=asked, name=name, plain=_plain(name), command=command,
        logs=shlex.quote(str(logs_of(name, runs))), limit=_slurm_time(limit), grace=grace,
        stop_after=limit - grace, go_on=GO_ON_STATUS, port=FIRST_PORT, mounted=MOUNTED,
    )  # fmt: skip


@cache
def _templates() -> jinja2.Environment:
    """The scripts; shell and YAML, so nothing is escaped but what is quoted here."""
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "scripts"), undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip


def logs_of(name: str, runs: str | Path) -> Path:
    """The folder of a launched recipe's logs: one file for each process."""
    return Path(runs) / name / ".logs"


def submit(text: str, target: str, recipe: str, runs: str | Path) -> str:
    """Keep a script with the runs and hand it to its scheduler; returns what that says.

    torchrun and Ray's client run in the foreground, in this process's place.
    """
    needed = {"torchrun": "bash", "slurm": "sbatch", "sky": "sky", "ray": "ray"}[target]
    if shutil.which(needed) is None:
        raise TriviumError(
            f"there is no `{needed}` on this machine, so nothing was submitted; say --print or --to FILE, "
            "and submit the script where it is."
        )
    from trivium.kit.files import write_text

    path = logs_of(load(recipe).name, runs) / f"launch.{'yaml' if target == 'sky' else 'sh'}"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text)
    if target in ("torchrun", "ray"):
        os.execvp("bash", ["bash", str(path)])
    words = ["sbatch", str(path)] if target == "slurm" else ["sky", "jobs", "launch", "--yes", str(path)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines() or ["nothing"]
        raise TriviumError(f"{shlex.join(words)} failed with status {done.returncode}: {said[-1]}")
    return f"{done.stdout.strip()}\nThe script: {path}"


def _check(target: str, asked: Machines) -> None:
    """Refuse what a target cannot do."""
    if target in ("torchrun", "ray") and asked.nodes > 1:
        raise TriviumError(
            f"{target} starts the processes of one machine, not of {asked.nodes}; choose slurm or sky, "
            "or leave out --nodes."
        )
    if asked.jobs is not None and (target != "slurm" or asked.nodes > 1):
        raise TriviumError("--jobs makes an array of SLURM; write --on slurm, and leave out --nodes.")
    if (asked.bucket or asked.volume) and target != "sky":
        raise TriviumError(
            "--bucket and --volume are SkyPilot's; write --on sky, or name the folder with --runs."
        )
    if asked.bucket and asked.nodes > 1:
        raise TriviumError(
            f"a bucket shows files to other machines too late for {asked.nodes} of them; name a --volume "
            "that all of them see."
        )
    if target == "slurm" and seconds(asked.time) <= 2 * seconds(asked.grace):
        raise TriviumError(
            f"--time {asked.time} leaves no time to work before the last {asked.grace}; say a longer --time "
            "or a shorter --grace."
        )


def _slurm_time(limit: int) -> str:
    days, rest = divmod(limit, 86_400)
    return f"{days}-{rest // 3600:02d}:{rest // 60 % 60:02d}:{rest % 60:02d}"


def _plain(name: str) -> str:
    """A name that every scheduler takes."""
    return re.sub(r"[^a-zA-Z0-9-]+", "-", name).strip("-").lower() or "run"
