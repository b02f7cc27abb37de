"""Pushing to the Hub, and the facts that cards tell."""
