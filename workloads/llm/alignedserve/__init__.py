"""AlignedServe: batches of requests of like length, kept ready beside the running one."""
