"""Training: the loop, a job from config to record, its run folder and checkpoints, and the provenance of results."""
