"""A real SLURM on the loopback: submit, time limit, preempt, requeue, resume, end, and equal weights.

    python benchmarks/slurm_loopback.py WORK [--root FOLDER]

WORK is an empty folder for configuration, logs and runs. SLURM's programs are taken from PATH, or from
Debian's packages slurmctld, slurmd, slurm-client, slurm-wlm-basic-plugins, libhwloc15, liblua5.1-0 and
libmunge2 unpacked into FOLDER (`apt-get download NAME`, `dpkg -x FILE FOLDER`); nothing is installed. It
needs root, since slurmd starts jobs for others, and about nine minutes. The daemons end with it.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

RECIPE = """\
name: tiny
seed: 3
stages:
  words: {kind: tokenizer, data: [{path: world:prose, limit: 60}], vocabulary: 300}
  corpus: {kind: corpus, data: [{path: world:prose, limit: 60}], tokenizer: words, validation: 0.1}
  base: {kind: pretrain, data: corpus, model: {depth: 1, width: 32, head_width: 16, heads: 2}, context: 64,
         batch: 512, steps: STEPS, checkpoint: {every_steps: EVERY}}
"""
CONFIGURATION = """\
ClusterName=loopback
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort=16817
SlurmdPort=16818
AuthType=auth/none
CredType=cred/none
SlurmUser=root
SlurmdUser=root
{plugins}
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=bf_interval=2,requeue_delay=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
StateSaveLocation={work}/state
SlurmdSpoolDir={work}/spool
SlurmctldPidFile={work}/slurmctld.pid
SlurmdPidFile={work}/slurmd.pid
SlurmctldLogFile={work}/slurmctld.log
SlurmdLogFile={work}/slurmd.log
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
ReturnToService=2
KillWait=20
MinJobAge=3600
SlurmdParameters=config_overrides
NodeName={host} NodeAddr=127.0.0.1 CPUs=4 State=UNKNOWN
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=30
PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF
"""
START = time.monotonic()


def tiny_recipe(steps: int, every: int) -> str:
    """A training of so many short steps, which saves its state after every so many."""
    return RECIPE.replace("STEPS", str(steps)).replace("EVERY", str(every))


def say(text: str) -> None:
    print(f"{time.monotonic() - START:5.0f} s  {text}", flush=True)


def started(work: Path, root: Path | None) -> list[subprocess.Popen[bytes]]:
    """The controller and the node's daemon, in the foreground of this process."""
    plugins, step = "", []
    if root is not None:
        libraries = root / "usr" / "lib" / "x86_64-linux-gnu"
        os.environ["PATH"] = f"{root}/usr/bin:{root}/usr/sbin:{os.environ['PATH']}"
        os.environ["LD_LIBRARY_PATH"] = f"{libraries}:{libraries}/slurm-wlm"
        plugins, step = f"PluginDir={libraries}/slurm-wlm", ["-d", f"{root}/usr/sbin/slurmstepd-wlm"]
    for name in ("state", "spool"):
        (work / name).mkdir(parents=True, exist_ok=True)
    configuration = work / "slurm.conf"
    configuration.write_text(CONFIGURATION.format(host=socket.gethostname(), work=work, plugins=plugins))
    os.environ["SLURM_CONF"] = str(configuration)
    program = lambda name: shutil.which(f"{name}-wlm") or shutil.which(name) or name
    return [
        subprocess.Popen([program("slurmctld"), "-D", "-c"], stderr=subprocess.DEVNULL),
        subprocess.Popen([program("slurmd"), "-D", *step], stderr=subprocess.DEVNULL),
    ]


def job(number: str) -> dict[str, str]:
    """What the controller says of a job."""
    shown = subprocess.run(["scontrol", "show", "job", "-o", number], capture_output=True, text=True)
    return dict(re.findall(r"(\S+?)=(\S*)", shown.stdout))


def until(number: str, what: str, holds: Callable[[dict[str, str]], bool], seconds: float = 300) -> None:
    """Wait for something of a job, and say when it came."""
    end = time.monotonic() + seconds
    while not holds(found := job(number)):
        if time.monotonic() > end:
            sys.exit(f"{what} did not come: {found.get('JobState')}, restarts {found.get('Restarts')}")
        time.sleep(0.5)
    say(f"{what}: job {number} {found['JobState']}, restarts {found['Restarts']}")


def submitted(*words: str) -> str:
    done = subprocess.run(words, capture_output=True, text=True)
    print(done.stdout.strip(), done.stderr.strip(), flush=True)
    return re.search(r"Submitted batch job (\d+)", done.stdout)[1]


def states(runs: Path) -> list[Path]:
    return sorted(runs.glob("store/base-*/checkpoints/step-*"))


def steps_in(log: Path) -> list[str]:
    """What the run itself said of stopping and going on."""
    said = r"(Stopped after step \d+|Going on after step \d+|going on where|already complete)"
    return re.findall(said, log.read_text())


def scenario(work: Path, steps: int) -> None:
    recipe, runs = work / "tiny.yaml", work / "runs"
    recipe.write_text(tiny_recipe(steps, every=50))
    trivium = [str(Path(sys.executable).parent / "trivium")]
    launch = [*trivium, "launch", str(recipe), "--no-gpus", "--processes", "2", "--cpus", "1"]
    os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    os.chdir(work)
    slurm = ["--on", "slurm", "--time", "2m", "--grace", "50s", "--sbatch=--partition=low"]
    number = submitted(*launch, "--runs", str(runs), *slurm)
    until(number, "started", lambda now: now["JobState"] == "RUNNING")
    until(number, "time up, requeued", lambda now: now["Restarts"] == "1")
    until(number, "started again", lambda now: now["JobState"] == "RUNNING")
    before = len(states(runs)) and states(runs)[-1]
    while not states(runs) or states(runs)[-1] == before:
        time.sleep(0.2)
    high = submitted("sbatch", "--partition=high", "--exclusive", "--output=high.log", "--wrap", "sleep 5")
    until(high, "the job that takes its place runs", lambda now: now["JobState"] == "RUNNING")
    until(number, "preempted, requeued", lambda now: int(now["Restarts"]) >= 2)
    until(number, "started again", lambda now: now["JobState"] == "RUNNING")
    until(
        number, "ended", lambda now: now["JobState"] in ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED"), 900
    )
    log = work / f"trivium-tiny-{number}.log"
    say(f"{job(number)['JobState']}, exit {job(number)['ExitCode']}; the run said: {steps_in(log)}")
    number = submitted("sbatch", str(runs / "tiny" / ".logs" / "launch.sh"))
    until(number, "submitted once more", lambda now: now["JobState"] == "COMPLETED")
    say(f"it said: {steps_in(work / f'trivium-tiny-{number}.log')}")
    subprocess.run([*launch, "--runs", "alone", "--on", "torchrun"], check=True, stderr=subprocess.DEVNULL)
    one, other = (place / "tiny/base/model/model.safetensors" for place in (runs, work / "alone"))
    say(f"equal to a run that was left alone, bit for bit: {one.read_bytes() == other.read_bytes()}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("work", type=Path)
    parser.add_argument("--root", type=Path)
    parser.add_argument("--steps", type=int, default=6000)
    asked = parser.parse_args()
    work = asked.work.resolve()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    daemons = started(work, asked.root and asked.root.resolve())
    try:
        time.sleep(3)
        scenario(work, asked.steps)
    finally:
        subprocess.run(["scancel", "--full", "--signal=KILL", "--user=root"], check=False)
        for daemon in reversed(daemons):
            daemon.send_signal(signal.SIGTERM)
            daemon.wait()


if __name__ == "__main__":
    main()
