"""Fine-tuning of encoders and rerankers on Ray Train. Floor 9: uses everything below."""
