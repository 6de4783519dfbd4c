"""What this machine can do at best: the denominators of every "% of peak"."""
