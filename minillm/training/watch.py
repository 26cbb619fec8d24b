"""Who of the ranks is missing: each one beats, everybody reads the beats, and whoever finds a rank gone names it.

A collective operation that waits for a dead or stalled rank waits for half an hour, and its error names nobody. So
each rank writes a beat into the store that brought them together, with the number of collectives it has begun: a rank
whose beat stops is gone, and one that has begun fewer than the others while nothing moves is what they wait for.
"""

import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from typing import Any

BEAT, QUICK = 0.5, 3.0
"""Seconds between beats, and after how many without one a rank counts as gone once a collective has failed."""


@dataclass(frozen=True)
class Beat:
    """What a rank says of itself."""

    count: int
    host: str
    begun: int
    """Collectives so far."""
    busy: str | None
    """What it does alone, however long that takes, while the others wait."""
    failed: str | None
    """Its last words."""
    stopped: int | None
    """The signal by which it was asked to end before training began."""
    done: bool


class Judge:
    """Finds the rank that holds the others up.

    Args:
        limit: seconds without any sign after which a rank is missing.
    """

    def __init__(self, limit: float):
        self.limit = limit
        self.beats: list[Beat] = []
        self.looked = self.moved = 0.0
        self.beaten: list[float] = []

    def look(self, beats: list[Beat], now: float, *, training: bool, quick: bool) -> tuple[int, str] | None:
        """(rank, what is wrong with it) of the one to blame, if there is one.

        Args:
            now: seconds of any clock that only rises.
            training: whether silence counts; before and after training a rank may be silent for long.
            quick: a collective has failed, so somebody is gone.
        """
        if not self.beats or now - self.looked > self.limit / 2:  # we were stopped ourselves: old times mean nothing
            self.beaten, self.moved = [now] * len(beats), now
        else:
            for rank, (old, new) in enumerate(zip(self.beats, beats, strict=True)):
                self.beaten[rank] = now if new.count != old.count else self.beaten[rank]
                self.moved = now if new.begun != old.begun or new.busy else self.moved
        self.beats, self.looked = beats, now
        for rank, beat in enumerate(beats):
            if beat.failed is not None:
                return rank, f"failed: {beat.failed}"
        waiting = training and now - self.moved > self.limit
        most = max(beat.begun for beat in beats)
        for rank, beat in enumerate(beats):
            silent = now - self.beaten[rank]
            behind = waiting and beat.begun < most
            if not beat.done and (silent > (QUICK if quick or behind else self.limit)) and (training or quick):
                return rank, f"gives no sign of life (for {silent:.0f} s): it was killed or stopped, or is unreachable"
            if behind:
                return rank, f"stalls: the others have waited {self.limit:.0f} s for it"
        return None


class Watch:
    """The beating of this rank, and the end of the process once a rank is missing.

    Args:
        store: where the ranks met; the thread talks to it over a connection of its own.
        limit: as for `Judge`.
        begun: how many collectives this rank has begun.
        terminal: a file descriptor that a person reads, where stderr may be a log.
    """

    def __init__(self, store: Any, rank: int, size: int, *, limit: float, begun: Callable[[], int], terminal: int):
        self.store, self.rank, self.begun, self.terminal = store.clone(), rank, begun, terminal
        self.keys = [f"beat/{each}" for each in range(size)]
        self.judge = Judge(limit)
        self.training = self.quick = False
        self.busy_with: str | None = None
        self.failed: str | None = None
        self.stopped: int | None = None
        self.done = False
        self.count = 0
        self.where = ""
        self.main = threading.get_ident()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat_and_look, daemon=True, name="watch")
        self._publish()

    def start(self) -> None:
        """To be called once every rank has made its `Watch`."""
        self._thread.start()

    @contextmanager
    def busy(self, what: str) -> Iterator[None]:
        """While open, the others wait for this rank with patience, as long as its beat goes on."""
        before, self.busy_with = self.busy_with, what
        try:
            yield
        finally:
            self.busy_with = before

    def await_verdict(self, seconds: float) -> None:
        """After a failed collective: time to find out who is gone. Does not come back if somebody is."""
        self.quick = True
        time.sleep(seconds)
        self.quick = False

    def end(self, failed: str | None = None, stopped: int | None = None) -> None:
        """The last beat: done, or `failed` and why, or `stopped` by which signal."""
        self._stop.set()
        self._thread.join(timeout=5)
        self.failed, self.stopped, self.done = failed, stopped, True
        with suppress(RuntimeError):  # the store may have gone with whoever kept it
            self._publish()
        if self.rank == 0 and (failed or stopped):  # the store may go with this process: the others read first
            time.sleep(2 * BEAT)

    def _publish(self) -> None:
        self.count += 1
        beat = Beat(
            self.count, socket.gethostname(), self.begun(), self.busy_with, self.failed, self.stopped, self.done
        )
        self.store.set(self.keys[self.rank], json.dumps(asdict(beat)))

    def _beat_and_look(self) -> None:
        try:
            while not self._stop.wait(BEAT):
                self._publish()
                beats = [Beat(**json.loads(raw)) for raw in self.store.multi_get(self.keys)]
                stopped = next((beat.stopped for beat in beats if beat.stopped is not None), None)
                if stopped is not None:
                    return self._stop_too(stopped)
                found = self.judge.look(beats, time.monotonic(), training=self.training, quick=self.quick)
                if found is not None:
                    self._end_process(*found, beats)
        except RuntimeError as error:
            if not self._stop.is_set():
                self._say(
                    f"rank {self.rank} ends: whoever keeps the ranks together is gone ({str(error).splitlines()[0]})"
                )
                os._exit(1)

    def _stop_too(self, number: int) -> None:
        """Before training a signal to one rank is one to all; one that waits for another in C++ cannot hear it."""
        signal.pthread_kill(self.main, number)
        if not self._stop.wait(1.5 * QUICK):  # sooner than a rank whose collective has failed gives up waiting
            print("stopped, as another rank was", file=sys.stderr, flush=True)
            os._exit(128 + number)

    def _end_process(self, rank: int, what: str, beats: list[Beat]) -> None:
        if beats[rank].failed is not None and self._stop.wait(QUICK):
            return  # this rank has met the same error, and ends by itself
        line = f"error: rank {rank} ({beats[rank].host}) {what}; the run ends"
        if rank == self.rank:
            frame = sys._current_frames().get(self.main)
            stack = "".join(traceback.format_stack(frame)) if frame else ""
            print(f"{line}; this rank stood at:\n{stack}", file=sys.stderr, flush=True)
            os._exit(1)
        if self.rank == min(each for each in range(len(beats)) if each != rank and not beats[each].done):
            self._say(line + (f"; where it stood: {self.where.format(rank)}" if self.where else ""))
        else:
            print(line, file=sys.stderr, flush=True)
        # The others, and the one that is to blame, should see it too; rank 0 may be who keeps the store.
        time.sleep(BEAT if self.rank else QUICK)
        os._exit(1)

    def _say(self, line: str) -> None:
        os.write(self.terminal, f"{line}\n".encode())
