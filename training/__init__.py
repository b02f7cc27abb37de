"""Data, bank preparation, stages 1 and 2, evaluation and the command line."""
