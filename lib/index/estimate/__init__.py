"""The dry run of an index build: bytes, memory and core seconds of every stage. In `index`, above `build`."""
