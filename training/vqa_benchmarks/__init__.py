"""Benchmarks of visual question answering: lmms-eval asks and scores, this answers and compares."""
