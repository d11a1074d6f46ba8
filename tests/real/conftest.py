"""These tests need the checkpoint that `make test-real` fetches, and are not looked at by anything else."""

import os
import sys
from importlib.util import find_spec
from pathlib import Path

if not os.environ.get("TRIVIUM_REAL"):
    collect_ignore_glob = ["test_*.py"]
else:
    if find_spec("lm_eval") is None:
        # The extra `eval` brings lm-evaluation-harness, which has many dependencies of its own.
        collect_ignore_glob = ["test_lm_eval.py"]
    # Last, so that nothing takes the place of what is installed.
    sys.path.append(str(Path(os.environ["TRIVIUM_REAL"]).expanduser() / "google"))
