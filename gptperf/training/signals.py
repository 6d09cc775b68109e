"""The signals by which a user or a scheduler asks a run to stop or to save, and the answer to them.

A handler in Python runs only when the main thread is between two bytecodes, and the main thread may wait for a GPU, a
collective or a compiler. So Python also writes the number of each signal to a pipe, at once, and a thread reads it:
this thread answers the first request and ends the process at the second one.
"""

import contextlib
import ctypes
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

__all__ = ["StopRequest"]

_ASKED_TO_STOP = (signal.SIGTERM, signal.SIGINT)
_pipes = 0
"""Number of pipes that Python writes signals to, 0 or 1."""


def _leave_the_pipe() -> None:
    """Keeps the signals of a forked child out of the pipe of its parent, which would take them for its own."""
    if _pipes:
        signal.set_wakeup_fd(-1)


os.register_at_fork(after_in_child=_leave_the_pipe)


class StopRequest:
    """A request to the training loop: SIGTERM and Ctrl-C ask it to save and stop, SIGUSR1 to save and continue.

    A second SIGTERM or Ctrl-C ends the process at once. A scheduler may signal both torchrun and this process, and
    torchrun passes its signal on. So under torchrun every signal within `SAME_S` seconds of the first one is the same
    request.

    Args:
        answer: prints the answer to a request, STOP or SAVE; a thread of its own calls it.
    """

    SAME_S = 5.0
    NOTHING, SAVE, STOP = range(3)

    def __init__(self, answer: Callable[[int], object] = lambda request: None) -> None:
        self.requested = self._save = False
        self._answer = answer
        self._first: float | None = None
        self.same_s = self.SAME_S if "TORCHELASTIC_RUN_ID" in os.environ else 0.0
        """Seconds after the first signal in which a signal is the same request."""

    def take(self) -> int:
        """Returns STOP, SAVE or NOTHING, and clears a request to save; a request to stop stays."""
        save, self._save = self._save, False
        return self.STOP if self.requested else self.SAVE if save else self.NOTHING

    @contextlib.contextmanager
    def listening(self) -> Iterator["StopRequest"]:
        """Handles the signals in the body, and restores the previous handlers after it."""
        global _pipes
        numbers = [*_ASKED_TO_STOP, signal.SIGUSR1]
        if signal.getsignal(signal.SIGUSR1) == signal.SIG_IGN:  # the parent process uses this signal for other purposes
            numbers.remove(signal.SIGUSR1)
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        threading.Thread(target=self._listen, args=(reader,), name="signals", daemon=True).start()
        wakeup = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        _pipes += 1
        before = {number: signal.signal(number, self._note) for number in numbers}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(wakeup)
            _pipes -= 1
            os.close(writer)  # ends the thread

    def _note(self, number: int, frame: FrameType | None) -> None:
        """Notes a request in the main thread, so that this thread sees it before its next step."""
        if number in _ASKED_TO_STOP:
            self.requested = True
        else:
            self._save = True

    def _listen(self, reader: int) -> None:
        """Reads the numbers of the signals until the other end of the pipe is closed."""
        while numbers := os.read(reader, 64):
            for number in numbers:  # it may be a signal that others handle
                if number in _ASKED_TO_STOP:
                    self._asked_to_stop(number)
                elif number == signal.SIGUSR1 and self._first is None:
                    self._reply(self.SAVE)
        os.close(reader)

    def _asked_to_stop(self, number: int) -> None:
        now = time.monotonic()
        if self._first is None:
            self._first, self.requested = now, True
            self._reply(self.STOP)
        elif now - self._first >= self.same_s:
            # Only the main thread may call `signal.signal`, and it may be busy for long.
            ctypes.CDLL(None).signal(int(number), ctypes.c_void_p(0))  # 0 is SIG_DFL
            os.kill(os.getpid(), number)

    def _reply(self, request: int) -> None:
        # The thread that listens must not wait for a terminal, or it could not end the process.
        threading.Thread(target=self._answer, args=(request,), name="answer to a signal", daemon=True).start()
