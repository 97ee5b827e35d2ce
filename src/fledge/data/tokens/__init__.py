"""From text to rows of token ids: tokenizers, packing, and the batches that training reads."""
