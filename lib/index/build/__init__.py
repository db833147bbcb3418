"""The stages of an index build: sample, centroids and codec, codes, segments, recall, card. In `index`, above `exact`."""
