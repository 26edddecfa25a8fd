"""For instructors: labs that are handed out, collected and graded, and sweeps of a notebook over parameters."""
