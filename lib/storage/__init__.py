"""Objects at any fsspec URL: put in one step, created once, listed, tried again. Floor 2."""
