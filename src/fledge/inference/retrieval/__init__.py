"""Retrieval: an index over texts, the passages nearest to a question, answers that cite them."""
