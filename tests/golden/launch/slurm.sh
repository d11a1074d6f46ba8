#!/usr/bin/env bash
#SBATCH --job-name=trivium-pocket
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=64
#SBATCH --gpus-per-node=8
#SBATCH --time=1-00:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:TERM@120
#SBATCH --output=%x-%j.log
#SBATCH --partition=gpu
#SBATCH --account=me
set -euo pipefail
logs=/runs/pocket/.logs/"$SLURM_JOB_ID"
mkdir -p "$logs"
export logs TRIVIUM_LOGS="$logs" TRIVIUM_STOP_FILE="$logs/STOP"
export TRIVIUM_GO_ON_FILE="$logs/GO-ON${SLURM_ARRAY_TASK_ID:-}"
rm -f "$TRIVIUM_GO_ON_FILE"
TRIVIUM_STOP_AT=$(($(date +%s) + 86100))
export TRIVIUM_STOP_AT
# srun takes the number of cores from here alone.
export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}"
export OMP_NUM_THREADS=8
export TRIVIUM_CHECK_NODES=1
# Before the limit SLURM sends TERM to this shell; when it takes the job away, to the processes. These save,
# stop and leave the file. --requeue alone does not start a job again whose time is up.
signalled=""
work=""
# srun itself would have its processes killed; scancel sends the signal to them, not to this shell.
# shellcheck disable=SC2329
stop_work() { scancel --signal=TERM "$SLURM_JOB_ID" || kill -TERM "$work"; }
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
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# Jobs that share a machine meet at ports of their own.
export endpoint="$head:$((20000 + SLURM_JOB_ID % 10000))"
# shellcheck disable=SC2329
on_each_node() {
    mkdir -p "$logs/node-$SLURM_NODEID"
    exec python -m torch.distributed.run --nnodes=2 --rdzv-backend=c10d --rdzv-id="$SLURM_JOB_ID" --rdzv-endpoint="$endpoint" --rdzv-conf=join_timeout=900 --nproc-per-node=8 --max-restarts=3 --log-dir="$logs/node-$SLURM_NODEID" --redirects=3 --tee=0:3 \
        -m trivium.cli run pocket --runs /runs
}
export -f on_each_node
srun --kill-on-bad-exit=1 bash -c on_each_node &
work=$!
finish
