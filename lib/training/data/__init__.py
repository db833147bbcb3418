"""A training plan: Parquet in training order, one row group a global batch. In `training`, above `losses`."""
