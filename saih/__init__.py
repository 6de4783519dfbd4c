"""saih: measure how AI performance on a supercomputer changes as the application grows."""

__version__ = "0.1.0"
