"""From raw text to batches: collecting, the refinery, splitting, the tokenizer, packing and batch sources."""
