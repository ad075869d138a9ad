"""How every process logs: lines for people, or JSON lines for collectors with `HETERORL_LOG_FORMAT=json`."""

from __future__ import annotations

import json
import logging
import os
import sys
from datetime import UTC, datetime
from pathlib import Path

_OURS = ("heterorl", "heterorl_learner", "heterorl_sampler", "heterorl_operator", "__main__")


def shown(path: Path) -> str:
    """A path as one would type it from here."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


class _Plain(logging.Formatter):
    """`12:34:56 learner: message`, with the level's name from warnings on."""

    def __init__(self, process: str) -> None:
        super().__init__(datefmt="%H:%M:%S")
        self._process = process

    def formatMessage(self, record: logging.LogRecord) -> str:
        level = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        return f"{self.formatTime(record, self.datefmt)} {self._process}: {level}{record.message}"

    def usesTime(self) -> bool:
        return False


class _Json(logging.Formatter):
    """One object a line: time (UTC), level, process, logger, message, and the traceback if there is one."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "process": self._process,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


def setup_logging(process: str) -> None:
    """Log to stderr as `process` (`learner`, `far-0`): our own messages from INFO, those of libraries from WARNING."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Json(process) if os.environ.get("HETERORL_LOG_FORMAT") == "json" else _Plain(process))
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    logging.captureWarnings(True)
    for name in _OURS:
        logging.getLogger(name).setLevel(os.environ.get("HETERORL_LOG_LEVEL", "INFO").upper())
