"""The signals by which a user or a scheduler asks a run to stop or to save."""

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from types import FrameType

__all__ = ["StopRequest"]


class StopRequest:
    """A request to the training loop: SIGTERM and Ctrl-C ask it to save and stop, SIGUSR1 to save and continue.

    A second SIGTERM or Ctrl-C ends the process at once. A scheduler may signal both torchrun and this process, and
    torchrun passes its signal on. So under torchrun every signal within `SAME_S` seconds of the first one is the same
    request.
    """

    SAME_S = 5.0
    NOTHING, SAVE, STOP = range(3)

    def __init__(self) -> None:
        self.requested = self._save = False
        self._since = 0.0
        self._same_s = self.SAME_S if "TORCHELASTIC_RUN_ID" in os.environ else 0.0

    def _ask(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.requested:
            self.requested, self._since = True, now
        elif now - self._since >= self._same_s:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def _ask_to_save(self, number: int, frame: FrameType | None) -> None:
        self._save = True

    def take(self) -> int:
        """Returns STOP, SAVE or NOTHING, and clears a request to save; a request to stop stays."""
        save, self._save = self._save, False
        return self.STOP if self.requested else self.SAVE if save else self.NOTHING

    @contextlib.contextmanager
    def listening(self) -> Iterator["StopRequest"]:
        """Handles the signals in the body, and restores the previous handlers after it."""
        handlers = {signal.SIGTERM: self._ask, signal.SIGINT: self._ask, signal.SIGUSR1: self._ask_to_save}
        if signal.getsignal(signal.SIGUSR1) == signal.SIG_IGN:  # the parent process uses this signal for other purposes
            del handlers[signal.SIGUSR1]
        before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
