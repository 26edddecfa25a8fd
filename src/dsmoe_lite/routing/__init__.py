"""What a router did: recorded traces, metrics with their null baselines, and ablations."""
