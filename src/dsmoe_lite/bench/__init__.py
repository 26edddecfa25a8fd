"""Speeds as ratios of things measured in one process, turn by turn."""
