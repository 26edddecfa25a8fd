"""Charts and widgets of the course: call `renderer.enable()` once, then end a cell with `charts.<name>(rows)`."""
