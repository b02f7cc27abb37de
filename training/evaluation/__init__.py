"""Answers of a trained model, their likelihoods, and intervals of both."""
