"""The workloads: one folder a family, one folder a system inside it."""
