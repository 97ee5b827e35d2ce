"""Smaller models: int8 folders, GGUF files, and the proof of how much of the model is left in them."""
