"""Examples for in-context learning: which ones, in which order, and what the order does."""
