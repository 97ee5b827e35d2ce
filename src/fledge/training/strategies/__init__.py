"""Fine-tuning without losing what was known: penalties, unfreezing, replay, forgetting measured, cross-validation."""
