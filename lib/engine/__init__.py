"""The exactly-once map over shards: run folder, lease, mappers, executors, workers. Floor 4."""
