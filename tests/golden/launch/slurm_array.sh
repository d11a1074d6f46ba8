#!/usr/bin/env bash
#SBATCH --job-name=trivium-pocket
#SBATCH --array=0-5
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=4
#SBATCH --time=0-01:30:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:TERM@120
#SBATCH --output=%x-%A-%a.log
# 6 tasks share the stages of one recipe: each takes what is ready and no other makes.
set -euo pipefail
logs=/runs/pocket/.logs/"$SLURM_ARRAY_JOB_ID"
mkdir -p "$logs"
export logs TRIVIUM_LOGS="$logs" TRIVIUM_STOP_FILE="$logs/STOP"
export TRIVIUM_GO_ON_FILE="$logs/GO-ON${SLURM_ARRAY_TASK_ID:-}"
rm -f "$TRIVIUM_GO_ON_FILE"
TRIVIUM_STOP_AT=$(($(date +%s) + 5100))
export TRIVIUM_STOP_AT
# srun takes the number of cores from here alone.
export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}"
export OMP_NUM_THREADS=4
# Before the limit SLURM sends TERM to this shell; when it takes the job away, to the processes. These save,
# stop and leave the file. --requeue alone does not start a job again whose time is up.
signalled=""
work=""
# shellcheck disable=SC2329
stop_work() { kill -TERM "$work"; }
# shellcheck disable=SC2329
terminate() {
    signalled=yes
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
    if [ -n "$signalled" ]; then
        # The signal ended the first wait, not the work.
        status=0
        wait "$work" || status=$?
    fi
    # A person who left the stop file does not want it to start again.
    if [ -e "$TRIVIUM_STOP_FILE" ]; then exit "$status"; fi
    if [ "$status" = 75 ] || [ -e "$TRIVIUM_GO_ON_FILE" ]; then go_on; fi
    if [ -n "$signalled" ] && [ "$status" != 0 ]; then go_on; fi
    exit "$status"
}
python -m trivium.cli run pocket --runs /runs --jobs 1 &
work=$!
finish
