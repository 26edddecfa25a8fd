"""Leaf helpers: errors, paths, files, progress bars, the machine, statistics. They import nothing of the course."""
