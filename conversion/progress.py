"""Progress with bytes, rate and time left: a bar on a terminal, a plain line every few seconds elsewhere."""

import sys
import threading
import time
from types import TracebackType

SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """Counts bytes up to `total`, from any thread; prints to stderr unless `quiet`."""

    def __init__(self, total: int, quiet: bool, done: int = 0) -> None:
        self.total, self.done, self._before = total, done, done
        self._started = self._printed = time.monotonic()
        self._bar = None
        self._lock = threading.Lock()
        self._lines = not quiet and not sys.stderr.isatty()
        if not quiet and not self._lines:
            from tqdm import tqdm

            self._bar = tqdm(total=total, initial=done, unit="B", unit_scale=True, dynamic_ncols=True, smoothing=0.1)

    def advance(self, count: int) -> None:
        """`count` more bytes are done."""
        with self._lock:
            self.done += count
            if self._bar is not None:
                self._bar.update(count)
            now = time.monotonic()
            if self._lines and now - self._printed >= SECONDS_BETWEEN_LINES:
                self._printed = now
                print(self._line(now), file=sys.stderr, flush=True)

    def _line(self, now: float) -> str:
        rate = (self.done - self._before) / (now - self._started)
        left = duration((self.total - self.done) / rate) if rate else "unknown time"
        return f"{self.done / 1e9:.1f} of {self.total / 1e9:.1f} GB, {rate / 1e9:.2f} GB/s, {left} left"

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()


def duration(seconds: float) -> str:
    """'8 s', '3 min 20 s', '2 h 5 min'."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
