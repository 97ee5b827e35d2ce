"""Models that judge text: n-gram models, classifiers, and what they say of spelling."""
