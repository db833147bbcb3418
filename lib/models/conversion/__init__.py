"""Conversion of rerankers with model code of their own into plain transformers classifiers, verified by scores."""
