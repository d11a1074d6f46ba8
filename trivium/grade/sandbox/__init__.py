"""A walled room for programs nobody has read: what runs in it can compute and answer, and nothing else."""
