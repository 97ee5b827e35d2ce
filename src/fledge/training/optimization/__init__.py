"""How gradients become steps: optimisers, schedules, loss scaling."""
