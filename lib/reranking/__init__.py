"""The rerank job: pairs, or candidates joined by id, -> scores and ranks. Floor 5."""
