"""For instructors: sweeps of a notebook over parameters, and tables of their results."""
