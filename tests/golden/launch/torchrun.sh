#!/usr/bin/env bash
# pocket: 2 processes on this machine. Run it again to resume.
set -euo pipefail
logs=/runs/pocket/.logs
# Whatever is put there stops the run at its next saved state.
rm -f "$logs/STOP"
mkdir -p "$logs"
export TRIVIUM_LOGS="$logs" TRIVIUM_STOP_FILE="$logs/STOP"
export OMP_NUM_THREADS=8
export TRIVIUM_CHECK_NODES=1
exec python -m torch.distributed.run --standalone --nproc-per-node=2 --max-restarts=3 --log-dir="$logs" --redirects=3 --tee=0:3 \
    -m trivium.cli run pocket --runs /runs
