"""Hub cards for models and memory banks."""
