"""Charts of the course: `renderer.enable()` once, then `charts.<name>(rows)`; a chart is the cell's last value."""
