"""Workloads of somebody else, for tests: found through the entry points of the folder above."""
