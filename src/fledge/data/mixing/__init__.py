"""Mixtures of sources: shares, pieces of long documents, curricula, and carrying them out."""
