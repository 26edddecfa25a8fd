"""Helpers: errors, paths, files, progress bars, the machine, statistics. They import no other part of the package."""
