"""Building, changing and looking at memory banks."""
