"""The one loop that trains: trainer, objectives, batches, optimisers, schedules, checkpoints, processes."""
