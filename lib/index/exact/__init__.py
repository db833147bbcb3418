"""Exact search: blocks of queries x ranges of passages, merged. In `index`, above `kinds`."""
