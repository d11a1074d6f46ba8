"""The sandbox: untrusted programs run in isolated processes that can compute, answer and do nothing else."""
