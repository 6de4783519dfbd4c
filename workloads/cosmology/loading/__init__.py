"""Loading: how fast training volumes come off the disk, beside what the disk itself gives."""
