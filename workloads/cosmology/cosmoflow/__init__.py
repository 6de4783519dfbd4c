"""CosmoFlow: regress cosmological parameters from dark-matter volumes, at any size of volume and network."""
