"""Checkpoints that bring their own code -> plain transformers classifiers, held against the original. In `models`, floor 3."""
