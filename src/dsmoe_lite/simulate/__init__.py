"""Many devices on paper: where experts are placed, which rows move, how long a step takes."""
