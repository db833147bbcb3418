"""Options from dataclasses, sizes and durations in words, the live line, charts, pages. Floor 2: imports errors alone."""
