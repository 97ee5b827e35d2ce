"""What a training run minimises, a page for each paper."""
