"""Real servers that the tests talk to: nothing here imitates S3."""
