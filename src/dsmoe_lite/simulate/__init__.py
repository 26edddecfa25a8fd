"""Many devices on paper: expert placement, traffic between devices and nodes, and the time of a training step."""
