"""Signals that reach a training process, turned into questions the loop asks at safe moments."""

import os
import signal
from types import FrameType, TracebackType


class Stopped(BaseException):
    """The process was asked to end by the signal `number`; `code` is the exit code that says so (128 + signal).

    Like KeyboardInterrupt no Exception, so that nothing on its way takes it for a fault to recover from.
    """

    def __init__(self, number: int):
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number, self.code = number, 128 + number


class Signals:
    """While open: SIGTERM and SIGINT ask for an end, SIGUSR1 for a checkpoint; a second SIGINT quits at once.

    Until `careful` is set (nothing is worth saving yet) a signal raises `Stopped` where it arrives. What arrives waits
    in `stop` and `asked_to_save` for the loop, or a group of processes together, to ask.
    """

    HANDLED = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name))

    def __init__(self) -> None:
        self.careful = False
        self.save = False
        self.asked_to_save = False
        self.stop: int | None = None

    def __enter__(self) -> "Signals":
        self._before = {number: signal.signal(number, self._arrived) for number in self.HANDLED}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _arrived(self, number: int, frame: FrameType | None) -> None:
        if number not in (signal.SIGTERM, signal.SIGINT):
            self.asked_to_save = True
            return
        if self.stop is not None and number == signal.SIGINT:
            os._exit(128 + number)
        self.stop = number
        if not self.careful:
            raise Stopped(number)

    def poll(self) -> None:
        """Raises `Stopped` if the process was asked to end; `save` then says whether it was asked to save."""
        if self.asked_to_save:
            self.save, self.asked_to_save = True, False
        if self.stop is not None:
            raise Stopped(self.stop)
