"""How a program ends that is told to stop, or that the system does not let write: tidied up, and with one line."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# what libraries that are not written in Python say instead of raising OSError
WRITE_FAILURES = ("(os error ", "PytorchStreamWriter failed writing", "file write failed")


@contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM raises SystemExit inside, as Ctrl-C raises KeyboardInterrupt, so that temporary folders are removed."""

    def stop(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield  # handlers can't be set there
        return
    former = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, former)


@contextmanager
def write_errors(path: str | Path) -> Iterator[None]:
    """A disk that is full is an OSError, whatever class of its own a library raises."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        if not any(words in str(error) for words in WRITE_FAILURES):
            raise
        # what comes before the last colon says which library it was
        raise OSError(f"{path} can't be written: {' '.join(str(error).split(': ')[-1].split())}") from error
