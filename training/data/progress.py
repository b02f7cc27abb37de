"""Progress of long work, also where there is no terminal for a bar."""

import time

from tqdm.auto import tqdm

SECONDS_BETWEEN_LINES = 30


class Progress(tqdm):
    """A bar; switched off, it prints a line every 30 seconds."""

    def __init__(self, *args, **settings):
        super().__init__(*args, **settings)
        self.said = time.monotonic()

    def say(self, line: str) -> None:
        """Print how far the work is, where no bar shows it and the last line is old."""
        if self.disable and time.monotonic() - self.said > SECONDS_BETWEEN_LINES:
            self.said = time.monotonic()
            print(f"  {line}", flush=True)
