"""Vectors -> a faiss index, exactly once, with measured recall; search in it. Floor 6."""
