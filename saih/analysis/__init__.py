"""Pure functions from tables of raw samples to what a report says. Nothing here reads or writes files."""
