"""Fine-tuning of experts from a base."""
