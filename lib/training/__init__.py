"""Training: pairs become a plan of global batches, the plan becomes a model."""
