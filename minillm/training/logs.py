"""What each of several processes says: rank 0 to the terminal, the others into a file each."""

import os
import sys
import tempfile
from pathlib import Path
from typing import Any


class Logs:
    """Where stdout and stderr of a rank go: the lead's to the terminal, the others' to a file each.

    Until the run folder is known they are kept, and shown only where the process breaks down before it is.
    """

    def __init__(self, rank: int):
        self.rank, self.terminal = rank, os.dup(2)
        self.kept: Any = None
        if rank:
            self.kept = tempfile.TemporaryFile()  # noqa: SIM115 - open until the log is
            self._point(self.kept.fileno())

    def go_to(self, path: Path) -> None:
        if self.kept is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        sys.stderr.flush()
        self.kept.seek(0)
        with path.open("ab") as log:
            log.write(self.kept.read())
            log.flush()
            self._point(log.fileno())
        self.kept.close()
        self.kept = None

    def broke_down(self) -> None:
        """What was kept, and what is still to come, goes to the terminal."""
        if self.kept is not None:
            sys.stderr.flush()
            self.kept.seek(0)
            os.write(self.terminal, self.kept.read())
            self._point(self.terminal)

    @staticmethod
    def _point(target: int) -> None:
        for number in (1, 2):
            os.dup2(target, number)
