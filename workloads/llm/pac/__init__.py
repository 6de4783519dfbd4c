"""PAC (arXiv 2408.10746): parallel adapters beside a frozen backbone, an activation cache, hybrid parallelism."""
