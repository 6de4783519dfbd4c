"""MixCache: caches of three granularities in one denoise, each used where it costs least."""
