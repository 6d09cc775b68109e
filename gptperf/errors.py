"""The errors that gptperf reports to its user, one class for each exit code.

A mistake of the user is a `ValueError`, whose message says what was found, what is wanted, where, and the nearest valid
value. A missing device or package is a `RuntimeError`, whose message says how to fix it. `run_main` runs a command: it
prints either as one line on stderr and exits with its code; only `--debug` shows the stack.
"""

import contextlib
import difflib
import errno
import io
import os
import resource
import select
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NoReturn, TextIO

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DataError",
    "DeviceError",
    "DiskError",
    "GptperfError",
    "MOST_MISTAKES",
    "NonFiniteError",
    "OutOfMemoryError",
    "PREEMPTED",
    "PeerError",
    "READER_GONE",
    "main_guard",
    "mistakes",
    "nearest",
    "note",
    "report",
    "run_main",
]

MOST_MISTAKES = 20
"""Number of mistakes in a command line and its files after which no more are looked for."""

PREEMPTED = 75
"""Exit code of a run that a signal stopped after it had saved a checkpoint (EX_TEMPFAIL of sysexits.h)."""

READER_GONE = 128 + signal.SIGPIPE
"""Exit code after the reader of stdout has closed the pipe, the one that a shell shows for any such program."""

_OUTPUT_LOST = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO})
_DEBUG = ("--debug", *(f"--debug={value}" for value in ("true", "1", "yes", "on")))
_NEAR, _NEAR_SYNONYM = 0.81, 0.85
"""Smallest similarity, by `difflib`, at which a name is taken for a typo of a valid name, and of a synonym of one."""


class GptperfError(Exception):
    """Base class of the errors that are reported in one line."""

    exit_code = 1


class ConfigError(GptperfError, ValueError):
    """A configuration file or a flag is wrong."""

    exit_code = 2

    def __init__(self, *args: object, problems: Sequence[str] = ()):
        super().__init__(*args)
        self.problems = tuple(problems) or (str(self),)
        """The mistakes of a command line, one line each."""


class DataError(GptperfError, ValueError):
    """A data set is missing or corrupt, or does not fit the model."""

    exit_code = 3


class CheckpointError(GptperfError, ValueError):
    """A checkpoint is corrupt, incompatible or in use by another run."""

    exit_code = 4


class NonFiniteError(GptperfError, RuntimeError):
    """The loss or a gradient is not finite."""

    exit_code = 5


class DeviceError(GptperfError, RuntimeError):
    """The machine lacks something that the configuration needs: a GPU, a dtype, Triton or a compiler."""

    exit_code = 6


class OutOfMemoryError(GptperfError, RuntimeError):
    """The run does not fit into the memory of the GPU."""

    exit_code = 7


class DiskError(GptperfError, RuntimeError):
    """The disk is full or cannot be written."""

    exit_code = 8

    def __init__(self, *args: object, full: bool = False):
        super().__init__(*args)
        self.full = full


class PeerError(GptperfError, RuntimeError):
    """Another rank of the job failed, died or hangs."""

    exit_code = 9


def mistakes(problems: Sequence[str]) -> ConfigError:
    """Returns the error that reports every mistake of a command line, one line each."""
    more = " or more; the first ones are" if len(problems) >= MOST_MISTAKES else ""
    count = "" if len(problems) == 1 else f"{len(problems)} mistakes{more}\n  "
    return ConfigError(count + "\n  ".join(problems), problems=problems)


def nearest(name: str, names: Iterable[str], synonyms: Mapping[str, Sequence[str]] | None = None) -> str:
    """Returns "; nearest: NAME" for the valid name that is closest to `name`, or "" where none is close.

    Args:
        name: what was found.
        names: the valid names.
        synonyms: other words -> valid names, or `name=value`, that mean the same; the first that is in `names` counts.
            One that is misspelt counts, too.
    """
    known = {valid.lower(): valid for valid in names}
    meant = {
        word: next((text for text in texts if text.partition("=")[0].lower() in known), None)
        for word, texts in (synonyms or {}).items()
    }
    words = {**{word: text for word, text in meant.items() if text is not None}, **known}
    for found in dict.fromkeys((name.lower(), name.lower().replace("-", "_"))):
        close = [found] if found in words else [word for word in known if sorted(word) == sorted(found)]
        close = close or difflib.get_close_matches(found, known, 1, _NEAR)
        same = [word for word in words if _digits(word) == _digits(found)]  # float8 is no typo of float
        close = close or difflib.get_close_matches(found, same, 1, _NEAR_SYNONYM)
        if close:
            return f"; nearest: {words[close[0]]}"
    return ""


def _digits(word: str) -> str:
    return "".join(filter(str.isdigit, word))


def report(error: GptperfError) -> None:
    """Prints an error as one line on stderr. If stderr cannot be written, the exit code is all that is left to say."""
    with contextlib.suppress(OSError, ValueError):
        print(f"gptperf: E{error.exit_code}: {error}", file=sys.stderr, flush=True)


def note(text: str) -> None:
    """Prints a line for the user on stderr, in the first rank of a job only. It ignores a broken stderr."""
    if os.environ.get("RANK", "0") == "0":
        with contextlib.suppress(OSError, ValueError):
            print(f"gptperf: {text}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def _files_limit_named() -> Iterator[None]:
    """Raises any error that says "Too many open files" as a `DeviceError` that names the limit of the process."""
    try:
        yield
    except (OSError, ImportError, RuntimeError, ValueError) as error:
        if os.strerror(errno.EMFILE) not in str(error) and getattr(error, "errno", None) != errno.EMFILE:
            raise
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        said = " ".join(str(error).split())
        remedy = "raise it with ulimit -n NUMBER, and run the command again"
        raise DeviceError(f"{said}: the limit of this process is {limit} open files; {remedy}") from error


@contextlib.contextmanager
def main_guard(debug: bool = False) -> Iterator[None]:
    """Prints a `GptperfError` as `gptperf: E<code>: <message>` on stderr and exits with its code.

    With `debug` the error is raised instead, with its stack. If the reader of stdout has gone, the command ends
    silently; if the device of stdout is full, with one line.
    """
    try:
        with _files_limit_named():
            yield
    except GptperfError as error:
        if debug:
            raise
        report(error)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        if not (_reader_is_gone(sys.stdout) or _reader_is_gone(sys.stderr)):
            raise  # some other pipe or socket
        sys.exit(READER_GONE)
    except OSError as error:
        if error.filename is not None or error.errno not in _OUTPUT_LOST:
            raise
        sys.exit(_output_lost(error))
    except KeyboardInterrupt:
        sys.exit(130)


def run_main(main: Callable[[Sequence[str]], int | None], argv: Sequence[str] | None = None) -> NoReturn:
    """Runs a command in `main_guard`, flushes its output, and exits with its exit code.

    Args:
        main: takes the arguments, and returns the exit code; None means 0.
        argv: the arguments without the name of the program; None means those of the process.
    """
    argv = sys.argv[1:] if argv is None else argv
    _open_missing_streams()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a name that the terminal's encoding lacks is no error
    code: object = 0
    try:
        with main_guard(debug=any(text.lower() in _DEBUG for text in argv)):
            code = main(argv)
    except SystemExit as ended:
        code = ended.code
    finally:
        # Flush here: a failure of the interpreter's own flush at exit prints a message and changes the exit code.
        lost = _flush(sys.stdout)
        if lost is not None:
            code = code or (READER_GONE if isinstance(lost, BrokenPipeError) else _output_lost(lost))
        _flush(sys.stderr)
    sys.exit(code)


def _output_lost(error: OSError) -> int:
    """Reports that the output cannot be written, and returns the exit code."""
    lost = DiskError(f"the output cannot be written: {error.strerror}", full=error.errno == errno.ENOSPC)
    report(lost)
    return lost.exit_code


def _flush(stream: TextIO) -> OSError | None:
    """Flushes a stream; returns the error if that fails, and sends what is left in its buffer to the null device."""
    try:
        stream.flush()
    except OSError as error:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)
        return error
    except ValueError:  # the command has closed the stream
        pass
    return None


def _reader_is_gone(stream: TextIO) -> bool:
    """Returns whether a stream writes to a pipe that nobody reads."""
    poll = select.poll()
    try:
        poll.register(stream.fileno(), 0)
    except (OSError, ValueError):  # no file is behind the stream
        return False
    return bool(poll.poll(0))


def _open_missing_streams() -> None:
    """Connects stdin, stdout and stderr to the null device where the parent process has closed them.

    Without this, the next file that is opened becomes the stdout of every child process.
    """
    fd = os.open(os.devnull, os.O_RDWR)
    while fd <= 2:
        os.set_inheritable(fd, True)
        fd = os.open(os.devnull, os.O_RDWR)
    os.close(fd)
    sys.stdout = sys.stdout or open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = sys.stderr or open(2, "w", closefd=False)  # noqa: SIM115
