"""These tests need the checkpoint that `make test-real` fetches, and are not looked at by anything else."""

import os

if not os.environ.get("TRIVIUM_REAL"):
    collect_ignore_glob = ["test_*.py"]
