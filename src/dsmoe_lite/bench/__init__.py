"""Benchmarks: time and memory as ratios to a baseline that is measured in the same process, interleaved."""
