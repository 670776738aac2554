"""Files: atomic typed Parquet, manifests, the layout of artifacts on disk, the lock of a checkout."""
