#!/usr/bin/env bash
# pocket as a job of a Ray cluster; RAY_ADDRESS says where it is, such as http://head:8265.
set -euo pipefail
: "${RAY_ADDRESS:?say where the cluster is, such as http://head:8265}"
entry=$(cat <<'END'
logs=/runs/pocket/.logs
# Whatever is put there stops the run at its next saved state.
rm -f "$logs/STOP"
mkdir -p "$logs"
export TRIVIUM_LOGS="$logs" TRIVIUM_STOP_FILE="$logs/STOP"
export OMP_NUM_THREADS=8
exec python -m torch.distributed.run --standalone --nproc-per-node=1 --max-restarts=3 --log-dir="$logs" --redirects=3 --tee=0:3 \
    -m trivium.cli run pocket --runs /runs
END
)
ray job submit --entrypoint-num-cpus 8 --runtime-env-json '{"working_dir": ".", "excludes": ["runs", ".git", ".venv"]}' -- bash -euo pipefail -c "$entry"
