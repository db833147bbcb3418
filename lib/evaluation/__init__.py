"""Encoders and rerankers on C-MTEB, BEIR and one's own data: datasets, metrics, results, comparison. Floor 7."""
