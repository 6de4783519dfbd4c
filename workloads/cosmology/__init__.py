"""Synthetic universes to learn cosmology from: linear theory, 2LPT fields, a dataset of them, and models."""
