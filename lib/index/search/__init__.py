"""Search in a built index: queries x segments, merged, filtered, reranked. In `index`, above `build`."""
