"""Data sets as rows, chats and batches."""
