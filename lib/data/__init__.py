"""A corpus: files of several formats -> shards -> rows, texts, vectors. Floor 3."""
