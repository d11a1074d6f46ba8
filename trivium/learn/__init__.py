"""The one loop that trains: trainer, objectives, feeds, optimisers, schedules, checkpoints, processes."""
