"""A child's output in two places: the parent's stdout, where `kubectl logs` finds it, and a log that stays."""

from __future__ import annotations

import logging
import os
import sys
import threading
from pathlib import Path
from typing import IO

log = logging.getLogger(__name__)


class Tee:
    """Copies what is written to `pipe`, line by line, until all who hold it are gone.

    stdout comes first and always: a full volume must not hide the message that says so.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        reader, writer = os.pipe()
        self.pipe: IO[bytes] = os.fdopen(writer, "wb")
        """To be given to the child, and then closed here."""
        self.last_line = ""
        """The last line that is not empty."""
        self._thread = threading.Thread(target=self._copy, args=(reader,), name=f"tee-{path.stem}", daemon=True)
        self._thread.start()

    def join(self) -> None:
        """Wait until everything is copied, or briefly if another process still holds the pipe."""
        self._thread.join(timeout=5)

    def _copy(self, reader: int) -> None:
        with os.fdopen(reader, "rb") as source:
            file = self._open()
            for line in source:
                sys.stdout.buffer.write(line)
                sys.stdout.buffer.flush()
                self.last_line = line.decode(errors="replace").strip() or self.last_line
                file = self._keep(line, file)
            if file is not None:
                file.close()

    def _open(self) -> IO[bytes] | None:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            return open(self._path, "ab", buffering=0)
        except OSError as error:
            log.warning("%s is not written: %s", self._path, error)
            return None

    def _keep(self, line: bytes, file: IO[bytes] | None) -> IO[bytes] | None:
        """Append to the log as long as the volume takes it."""
        if file is None:
            return None
        try:
            file.write(line)
        except OSError as error:
            log.warning("%s cannot be written, its lines are printed here only: %s", self._path, error)
            file.close()
            return None
        return file
