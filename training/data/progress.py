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


class ImageProgress(Progress):
    """Progress over images, which says how many there are."""

    def __init__(self, total: int, desc: str, position: int):
        super().__init__(total=total, desc=desc, unit="image", position=position)
        # tqdm's own `n` and `desc` stand still or are missing while it is switched off
        self.what, self.count, self.done = desc, total, 0
        if position == 0 and total:
            tqdm.write(f"{desc}: {total:,} images.")

    def update(self, n: int = 1) -> None:
        """Count `n` more images."""
        super().update(n)
        self.done += n
        self.say(f"{self.what}: {self.done:,} of {self.count:,} images")
