"""One optimizer step at any number of ranks: GradCache, collectives, DDP and FSDP2. In `training`, above `losses`."""
