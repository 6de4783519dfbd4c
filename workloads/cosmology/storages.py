"""How a dataset can lie on disk: the rungs of every `storage` axis. Imports nothing, for planning."""

STORAGES = ("hdf5", "hdf5-gzip", "hdf5-lz4", "npy")
"""hdf5: a chunk a volume, as it is, deflated, or bitshuffled with LZ4 (hdf5plugin). npy: one array a shard."""

DEFAULT_STORAGE = "hdf5"

VOXEL_BYTES = 2
"""A voxel is an int16 count."""

LARGEST_CHUNK_BYTES = 2**32 - 1
"""HDF5 has no larger ones."""

SHARD_BYTES = 2**25
"""About a second's work of one core: what a killed job loses, and the grain by which ranks share the making."""


def volumes_per_shard(volume_bytes: int) -> int:
    """Volumes in one file; the last file of a dataset may hold fewer."""
    return max(1, SHARD_BYTES // volume_bytes)
