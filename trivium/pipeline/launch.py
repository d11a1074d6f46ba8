"""Scripts that start a run elsewhere; they are written, read by a person, and submitted by that person."""

from __future__ import annotations

import shlex
from pathlib import Path

from trivium.kit.errors import TriviumError
from trivium.recipe.schema import load

_TORCHRUN = """\
#!/usr/bin/env bash
# {name}: {processes} processes on this machine. Run it again to resume.
set -euo pipefail
torchrun --standalone --nproc-per-node={processes} -m trivium.cli {command}
"""

# Of an array, the number of the job may be that of all its tasks.
_AGAIN = """\
# Two minutes before the time is up, SLURM sends TERM: the run saves, and what is requeued goes on from there.
# SLURM itself requeues only what it takes away or what a broken node ends.
set -euo pipefail
again() {
    kill -TERM "$work"
    if wait "$work"; then exit 0; fi
    scontrol requeue "${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}"
    exit 0
}
trap again TERM"""

_SLURM = """\
#!/usr/bin/env bash
#SBATCH --job-name=trivium-{name}
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node={processes}
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=B:TERM@120
#SBATCH --output=%x-%j.log
{again}
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun torchrun --nnodes={nodes} --nproc-per-node={processes} --rdzv-backend=c10d \\
    --rdzv-id="$SLURM_JOB_ID" --rdzv-endpoint="$head:29500" -m trivium.cli {command} &
work=$!
wait "$work"
"""

_ARRAY = """\
#!/usr/bin/env bash
#SBATCH --job-name=trivium-{name}
#SBATCH --array=0-{last}
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node={processes}
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=B:TERM@120
#SBATCH --output=%x-%A-%a.log
# {tasks} tasks share the stages of one recipe: each takes what is ready and no other task makes.
{again}
python -m trivium.cli {command} --jobs {processes} &
work=$!
wait "$work"
"""

_SKY = """\
# sky launch -c trivium-{name} FILE; use `sky jobs launch` for spot machines: the run resumes by itself.
name: trivium-{name}
num_nodes: {nodes}
resources:
  accelerators: H100:{processes}
  disk_size: 500
workdir: .
setup: |
  pip install -e .
run: |
  head=$(echo "$SKYPILOT_NODE_IPS" | head -n 1)
  torchrun --nnodes={nodes} --nproc-per-node={processes} --node-rank="$SKYPILOT_NODE_RANK" \\
      --master-addr="$head" --master-port=29500 -m trivium.cli {command}
"""

TARGETS = {"torchrun": _TORCHRUN, "slurm": _SLURM, "sky": _SKY}


def script(
    recipe: str, target: str, runs: str | Path, nodes: int, processes: int, jobs: int | None = None
) -> str:
    """The script that runs a recipe on a target, with that many machines and processes on each.

    With `jobs`, a SLURM array of so many tasks instead, each with `processes` GPUs, which share the stages.
    """
    if target == "torchrun" and nodes > 1:
        raise TriviumError(
            f"torchrun starts the processes of one machine, not of {nodes}; choose slurm or sky, or leave out"
            " --nodes."
        )
    name = load(recipe).name
    if jobs is not None and (target != "slurm" or nodes > 1):
        raise TriviumError("--jobs makes an array of SLURM; write --on slurm, and leave out --nodes.")
    command = shlex.join(["run", recipe, "--runs", str(runs)])
    facts = {"name": name, "nodes": nodes, "processes": processes, "command": command, "again": _AGAIN}
    if jobs is not None:
        return _ARRAY.format(last=jobs - 1, tasks=jobs, **facts)
    return TARGETS[target].format(**facts)
