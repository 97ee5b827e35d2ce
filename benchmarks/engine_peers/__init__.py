"""The sides of `benchmarks/engine.py`, one a file: what its environment holds, where its model is, how it answers."""
