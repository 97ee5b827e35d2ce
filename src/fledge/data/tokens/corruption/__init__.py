"""Corruption of token rows for pre-training: masks, spans, denoising, as pure functions of (rows, seed, step)."""
