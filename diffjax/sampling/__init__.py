"""Sampling: one loop for every solver, and pictures from seeds."""
