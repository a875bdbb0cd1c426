"""The largest value of something while it is being watched."""

import threading
import time
from collections.abc import Callable

SAMPLE_S = 0.005


class Peak:
    """most: of what `read` gave while this was open, asked from a thread."""

    def __init__(self, read: Callable[[], int]):
        self._read, self.most, self._open = read, 0, True
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> "Peak":
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._open = False
        self._thread.join()

    def _watch(self) -> None:
        while self._open:
            self.most = max(self.most, self._read())
            time.sleep(SAMPLE_S)
