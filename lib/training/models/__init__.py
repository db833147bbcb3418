"""Models as they are trained and exported: embedder, reranker, BGE-M3, RetroMAE. In `training`, above `step`."""
