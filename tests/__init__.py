"""Tests of Shoal, in the order of lib; `support` has tiny models and data, `real` real servers and nodes."""
