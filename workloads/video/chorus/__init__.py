"""Chorus: a store of earlier requests' latents that similar requests begin from."""
