"""Answers to people: a server, a chat in the terminal, an app; and what all three share."""
