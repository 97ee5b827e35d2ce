"""Models that read: a class for a text, a tag for a word, a vector for a meaning, and learning each from little."""
