"""Which settings to train with: what is usual, a test over all rates, and sweeps over anything a recipe says."""
