"""What reads and writes text: the fifth noun, the engine. Requests in, text and probabilities out."""
