"""Training: both stages, and what they share."""
