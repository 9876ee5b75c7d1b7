"""Progress in images: a bar with images, images/s and time left; plain lines where there is no terminal."""

import datetime
import sys
import time
from types import TracebackType
from typing import Self, TextIO

from tqdm import tqdm


class Progress:
    """Progress of a run that counts images.

    total, initial: images of the whole run, and those done before this session (not counted in the
    rate). On a terminal a bar; elsewhere one line at the start of every `interval_s` seconds, so
    that a log file stays readable. is_silent: counts only, in all processes of a run but one.
    """

    def __init__(
        self, total: int, initial: int = 0, stream: TextIO | None = None, interval_s: float = 30.0, is_silent: bool = False
    ) -> None:
        self._is_silent = is_silent
        self._stream = sys.stderr if stream is None else stream
        self._total, self._initial, self._images = total, initial, initial
        self._interval_s = interval_s
        self._start = time.monotonic()
        self._last_line = self._start
        self._bar = None
        if self._stream.isatty() and not is_silent:
            self._bar = tqdm(
                total=total, initial=initial, unit="img", unit_scale=True, dynamic_ncols=True, file=self._stream
            )

    @property
    def images_per_s(self) -> float:
        """Mean rate of this session; 0 before the first update."""
        elapsed = time.monotonic() - self._start
        return (self._images - self._initial) / elapsed if elapsed > 0 else 0.0

    def update(self, images: int, note: str = "") -> None:
        """Move to `images` (absolute); `note` is shown behind the figures."""
        previous, self._images = self._images, images
        if self._bar is not None:
            if note:
                self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(images - previous)
            return
        now = time.monotonic()
        if now - self._last_line >= self._interval_s:
            self._last_line = now
            self.say(self.line(note))

    def line(self, note: str = "") -> str:
        """The bar's figures as text: '1,024/4,096 images, 210 images/s, 0:00:15 left'."""
        rate = self.images_per_s
        left = "unknown time"
        if rate > 0:
            left = str(datetime.timedelta(seconds=round(max(0, self._total - self._images) / rate)))
        text = f"{self._images:,}/{self._total:,} images, {rate:.3g} images/s, {left} left"
        return f"{text}, {note}" if note else text

    def say(self, text: str) -> None:
        """Print a line without breaking the bar."""
        if self._is_silent:
            return
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        else:
            print(text, file=self._stream, flush=True)

    def close(self) -> None:
        """Leave the bar where it stands."""
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
