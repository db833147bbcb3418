"""all-MiniLM-L6-v2 (sentence-transformers, Apache-2.0): mean pooling, normalised, no prompts, 256 tokens.

Source: its model card and modules. Verified here on the real weights: vectors equal sentence-transformers' within 1e-5.
"""

from . import Recipe

RECIPE = Recipe(models=("sentence-transformers/all-MiniLM-L6-v2",), pooling="mean", normalize=True, max_tokens=256)
