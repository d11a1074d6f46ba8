"""These tests need the checkpoint that `make test-real` fetches, and are not looked at by anything else."""

import os
from importlib.util import find_spec

if not os.environ.get("TRIVIUM_REAL"):
    collect_ignore_glob = ["test_*.py"]
elif find_spec("lm_eval") is None:
    # The extra `eval` brings lm-evaluation-harness, which has many dependencies of its own.
    collect_ignore_glob = ["test_lm_eval.py"]
