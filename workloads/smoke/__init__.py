"""Does a job on this site see what it should? The smallest workload that can tell."""
