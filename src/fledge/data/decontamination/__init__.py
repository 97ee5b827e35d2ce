"""Which evaluation items stand in training data, and the report on it."""
