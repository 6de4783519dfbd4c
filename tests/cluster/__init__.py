"""A real Slurm on one host, for tests and for people who want to try saih against one."""
