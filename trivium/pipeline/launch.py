"""Scripts that run a recipe under torchrun, SLURM, SkyPilot or Ray: rendered, and submitted.

torchrun starts the processes, and all of them again when one fails; a scheduler starts torchrun again. The
run itself stops at a saved state before a time limit, and the command is always the same: it begins, goes on,
or finds everything complete.
"""

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

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
    render: dict[str, Callable[[str, str, Path, Machines], str]] = {
        "torchrun": _torchrun, "slurm": _slurm if jobs is None else _array, "sky": _sky, "ray": _ray,
    }  # fmt: skip
    return render[target](name, command, logs_of(name, runs), asked)


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


def _words(lines: Iterable[str]) -> str:
    return "\n".join(lines) + "\n"


def _cores(asked: Machines) -> list[str]:
    """The same number of threads in every process: another one may round otherwise."""
    check = ["export TRIVIUM_CHECK_NODES=1"] if asked.nodes * asked.processes > 1 else []
    return [f"export OMP_NUM_THREADS={asked.cpus}", *check]


def _torchrun(name: str, command: str, logs: Path, asked: Machines) -> str:
    """All processes of one machine, in the foreground."""
    return _words([
        "#!/usr/bin/env bash",
        f"# {name}: {asked.processes} processes on this machine. Run it again to resume.",
        "set -euo pipefail",
        *_one_machine(logs, asked),
        f"exec {_agent(asked)} \\",
        f"    -m trivium.cli {command}",
    ])  # fmt: skip


def _one_machine(logs: Path, asked: Machines) -> list[str]:
    return [
        f"logs={shlex.quote(str(logs))}",
        "# Whatever is put there stops the run at its next saved state.",
        'rm -f "$logs/STOP"',
        'mkdir -p "$logs"',
        'export TRIVIUM_LOGS="$logs" TRIVIUM_STOP_FILE="$logs/STOP"',
        *_cores(asked),
    ]


def _agent(asked: Machines, *more: str) -> str:
    """Torchrun, with a file for each process's output; the first one's is shown as well."""
    meeting = more or ("--standalone",)
    return " ".join([
        "python -m torch.distributed.run", *meeting, f"--nproc-per-node={asked.processes}",
        f"--max-restarts={asked.restarts}", '--log-dir="$logs"', "--redirects=3", "--tee=0:3",
    ])  # fmt: skip


_AGAIN = """\
# Before the limit SLURM sends TERM to this shell; when it takes the job away, to the processes. These save,
# stop and leave the file. --requeue alone does not start a job again whose time is up.
told=""
work=""
STOP_WORK
# shellcheck disable=SC2329
terminate() {
    told=yes
    [ -z "$work" ] || stop_work || true
}
trap terminate TERM
go_on() {
    scontrol requeue "${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}"
    exit 0
}
finish() {
    status=0
    wait "$work" || status=$?
    if [ -n "$told" ]; then
        # The signal ended the first wait, not the work.
        status=0
        wait "$work" || status=$?
    fi
    # A person who left the stop file does not want it to start again.
    if [ -e "$TRIVIUM_STOP_FILE" ]; then exit "$status"; fi
    if [ "$status" = STATUS ] || [ -e "$TRIVIUM_GO_ON_FILE" ]; then go_on; fi
    if [ -n "$told" ] && [ "$status" != 0 ]; then go_on; fi
    exit "$status"
}"""


def _directives(name: str, asked: Machines, output: str, *more: str) -> list[str]:
    gpus = [f"--gpus-per-node={asked.processes}"] if asked.gpus else []
    words = [
        f"--job-name=trivium-{_plain(name)}", *more, f"--nodes={asked.nodes}", "--ntasks-per-node=1",
        f"--cpus-per-task={asked.cpus * asked.processes}", *gpus,
        f"--time={_slurm_time(seconds(asked.time))}",
        "--requeue", "--open-mode=append", f"--signal=B:TERM@{seconds(asked.grace) * 2 // 5}",
        f"--output={output}", *asked.directives,
    ]  # fmt: skip
    return ["#!/usr/bin/env bash", *(f"#SBATCH {word}" for word in words)]


def _slurm_time(limit: int) -> str:
    days, rest = divmod(limit, 86_400)
    return f"{days}-{rest // 3600:02d}:{rest // 60 % 60:02d}:{rest % 60:02d}"


_TO_STEPS = """\
# srun itself would have its processes killed; scancel sends the signal to them, not to this shell.
# shellcheck disable=SC2329
stop_work() { scancel --signal=TERM "$SLURM_JOB_ID" || kill -TERM "$work"; }"""
_TO_PROCESS = """\
# shellcheck disable=SC2329
stop_work() { kill -TERM "$work"; }"""


def _limits(logs: Path, job: str, asked: Machines) -> list[str]:
    """What a SLURM script sets before the work: logs, when to stop, and how it is said that work is left."""
    return [
        "set -euo pipefail",
        f'logs={shlex.quote(str(logs))}/"{job}"',
        'mkdir -p "$logs"',
        'export logs TRIVIUM_LOGS="$logs" TRIVIUM_STOP_FILE="$logs/STOP"',
        'export TRIVIUM_GO_ON_FILE="$logs/GO-ON${SLURM_ARRAY_TASK_ID:-}"',
        'rm -f "$TRIVIUM_GO_ON_FILE"',
        f"TRIVIUM_STOP_AT=$(($(date +%s) + {seconds(asked.time) - seconds(asked.grace)}))",
        "export TRIVIUM_STOP_AT",
        "# srun takes the number of cores from here alone.",
        'export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}"',
        *_cores(asked),
        *_AGAIN.replace("STATUS", str(GO_ON_STATUS))
        .replace("STOP_WORK", _TO_STEPS if asked.jobs is None else _TO_PROCESS)
        .splitlines(),
    ]


def _slurm(name: str, command: str, logs: Path, asked: Machines) -> str:
    """A job on one machine or more: torchrun's agent on each of them."""
    meeting = (
        f"--nnodes={asked.nodes}", "--rdzv-backend=c10d", '--rdzv-id="$SLURM_JOB_ID"',
        '--rdzv-endpoint="$endpoint"', "--rdzv-conf=join_timeout=900",
    )  # fmt: skip
    agent = _agent(asked, *meeting).replace('"$logs"', '"$logs/node-$SLURM_NODEID"')
    return _words([
        *_directives(name, asked, "%x-%j.log"),
        *_limits(logs, "$SLURM_JOB_ID", asked),
        'head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
        "# Jobs that share a machine meet at ports of their own.",
        f'export endpoint="$head:$(({FIRST_PORT} + SLURM_JOB_ID % 10000))"',
        "# shellcheck disable=SC2329",
        "on_each_node() {",
        '    mkdir -p "$logs/node-$SLURM_NODEID"',
        f"    exec {agent} \\",
        f"        -m trivium.cli {command}",
        "}",
        "export -f on_each_node",
        "srun --kill-on-bad-exit=1 bash -c on_each_node &",
        "work=$!",
        "finish",
    ])  # fmt: skip


def _array(name: str, command: str, logs: Path, asked: Machines) -> str:
    """Tasks that share the stages of one recipe, such as the arms and seeds of an experiment."""
    assert asked.jobs is not None
    return _words([
        *_directives(name, asked, "%x-%A-%a.log", f"--array=0-{asked.jobs - 1}"),
        f"# {asked.jobs} tasks share the stages of one recipe: each takes what is ready and no other makes.",
        *_limits(logs, "$SLURM_ARRAY_JOB_ID", asked),
        f"python -m trivium.cli {command} --jobs {asked.processes} &",
        "work=$!",
        "finish",
    ])  # fmt: skip


def _sky(name: str, command: str, logs: Path, asked: Machines) -> str:
    """A task of SkyPilot: for `sky jobs launch` (spot machines, started again elsewhere) or `sky launch`."""
    accelerators = [f"  accelerators: {asked.accelerator}:{asked.processes}"] if asked.gpus else []
    kept = []
    if asked.bucket:
        source = "source" if "://" in asked.bucket else "name"
        kept = ["file_mounts:", f"  {MOUNTED}:", f"    {source}: {asked.bucket}", "    mode: MOUNT_CACHED"]
    if asked.volume:
        kept = ["volumes:", f"  {MOUNTED}: {asked.volume}"]
    if asked.nodes == 1:
        meeting: tuple[str, ...] = ("--standalone",)
        before = []
    else:
        meeting = (
            f"--nnodes={asked.nodes}", "--rdzv-backend=c10d", '--rdzv-id="$SKYPILOT_TASK_ID"',
            '--rdzv-endpoint="$head:29500"', "--rdzv-conf=join_timeout=900",
        )  # fmt: skip
        before = ['head=$(echo "$SKYPILOT_NODE_IPS" | head -n 1)']
    run = [
        "set -euo pipefail",
        f'logs={shlex.quote(str(logs))}/"$SKYPILOT_TASK_ID/node-$SKYPILOT_NODE_RANK"',
        'mkdir -p "$logs"',
        'export TRIVIUM_LOGS="$logs" TRIVIUM_STOP_FILE="$logs/STOP" TRIVIUM_GO_ON_FILE="$logs/GO-ON"',
        *_cores(asked),
        *before,
        f"{_agent(asked, *meeting)} \\",
        f"    -m trivium.cli {command}",
        f'if [ -e "$TRIVIUM_GO_ON_FILE" ]; then exit {GO_ON_STATUS}; fi',
    ]
    return _words([
        "# sky jobs launch FILE: on spot machines, started again elsewhere when one is taken away.",
        "# sky launch -c NAME FILE: on machines that stay; there the run goes on when it is launched again.",
        f"name: trivium-{_plain(name)}",
        f"num_nodes: {asked.nodes}",
        "resources:",
        *accelerators,
        f"  cpus: {asked.cpus * asked.processes}+",
        "  disk_size: 500",
        "  use_spot: true",
        "  job_recovery:",
        f"    max_restarts_on_errors: {asked.restarts}",
        f"    recover_on_exit_codes: [{GO_ON_STATUS}]",
        *(kept or ["# Without --bucket or --volume, --runs lies on a disk that goes with the machine."]),
        "workdir: .",
        "setup: |",
        "  pip install .",
        "run: |",
        *(f"  {line}" for line in run),
    ])  # fmt: skip


def _ray(name: str, command: str, logs: Path, asked: Machines) -> str:
    """A job of a Ray cluster: `curate` with `engine: ray` spreads over it, training is on one machine."""
    gpus = [f"--entrypoint-num-gpus {asked.processes}"] if asked.gpus else []
    cores = asked.cpus * asked.processes
    excluded = '\'{"working_dir": ".", "excludes": ["runs", ".git", ".venv"]}\''
    return _words([
        "#!/usr/bin/env bash",
        f"# {name} as a job of a Ray cluster; RAY_ADDRESS says where it is, such as http://head:8265.",
        "set -euo pipefail",
        ': "${RAY_ADDRESS:?say where the cluster is, such as http://head:8265}"',
        "entry=$(cat <<'END'",
        *_one_machine(logs, asked),
        f"exec {_agent(asked)} \\",
        f"    -m trivium.cli {command}",
        "END",
        ")",
        " ".join([
            f"ray job submit --entrypoint-num-cpus {cores}", *gpus, f"--runtime-env-json {excluded}",
            '-- bash -euo pipefail -c "$entry"',
        ]),
    ])  # fmt: skip


def _plain(name: str) -> str:
    """A name that every scheduler takes."""
    return re.sub(r"[^a-zA-Z0-9-]+", "-", name).strip("-").lower() or "run"
