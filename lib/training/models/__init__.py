"""Models to train and export: embedder, reranker, BGE-M3, RetroMAE pretraining. Each implements `step.trainable.Trainable`."""
