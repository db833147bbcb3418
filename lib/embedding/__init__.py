"""The embed job: every row of a corpus as a row with its vector. Floor 5."""
