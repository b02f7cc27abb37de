"""Progress over images, also where there is no terminal for a bar."""

import time

from tqdm.auto import tqdm

SECONDS_BETWEEN_LINES = 30


class ImageProgress(tqdm):
    """A bar that says how many images there are; switched off, it prints a line every 30 seconds."""

    def __init__(self, total: int, desc: str, position: int):
        super().__init__(total=total, desc=desc, unit="image", position=position)
        self.what, self.count, self.done, self.said = desc, total, 0, time.monotonic()
        if position == 0 and total:
            tqdm.write(f"{desc}: {total:,} images.")

    def update(self, n: int = 1) -> None:
        """Count `n` more images."""
        super().update(n)
        self.done += n
        if self.disable and time.monotonic() - self.said > SECONDS_BETWEEN_LINES:
            self.said = time.monotonic()
            print(f"  {self.what}: {self.done:,} of {self.count:,} images", flush=True)
