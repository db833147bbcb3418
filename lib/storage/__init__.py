"""Objects at any fsspec URL: published in one step, claimed once, listed, retried. Floor 2."""
