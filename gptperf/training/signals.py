"""The signals that ask a run to stop or to save."""

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from types import FrameType

__all__ = ["StopRequest"]


class StopRequest:
    """SIGTERM and Ctrl-C ask the loop to save and stop, SIGUSR1 to save and go on; a second one of the first two ends.

    torchrun passes on the signal that a scheduler may have sent to this process too: there, what comes within seconds
    of the first one is the same request.
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
        """STOP, SAVE or NOTHING; a wish to save is told once."""
        save, self._save = self._save, False
        return self.STOP if self.requested else self.SAVE if save else self.NOTHING

    @contextlib.contextmanager
    def listening(self) -> Iterator["StopRequest"]:
        handlers = {signal.SIGTERM: self._ask, signal.SIGINT: self._ask, signal.SIGUSR1: self._ask_to_save}
        if signal.getsignal(signal.SIGUSR1) == signal.SIG_IGN:  # whoever started this process has another use for it
            del handlers[signal.SIGUSR1]
        before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
