"""Generation of universes as a workload, and the making of whole data sets."""
