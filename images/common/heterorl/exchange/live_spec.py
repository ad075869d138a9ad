"""A process's spec, which follows the edits of its file."""

from __future__ import annotations

import logging
from pathlib import Path

from pydantic import ValidationError

from heterorl.errors import HeteroRLError, RunFolderError
from heterorl.exchange.storage import Files
from heterorl.spec.load import inline_traces
from heterorl.spec.mutability import changes, is_refused_live, take_over
from heterorl.spec.run import HeteroRLRun

log = logging.getLogger(__name__)


class LiveSpec:
    """The manifest in a file, read again whenever the file was replaced.

    A process that keeps a value is not affected by an edit; one that asks again sees it. Only what may change during a
    run changes here (`heterorl.spec.mutability`), so that no process works with half of an edit: a ConfigMap that is
    edited manually is validated by no API server. A file that cannot be read leaves everything as it was.
    """

    def __init__(self, file: Path, root: Path, files: Files) -> None:
        self._file, self._root, self._files = file, root, files
        self._seen: tuple[int, ...] | None = None
        self._run: HeteroRLRun | None = None

    def read(self) -> HeteroRLRun:
        """The manifest now; traces of delays are read in, from a file on the volume where they are not yet."""
        try:
            seen = self._files.identity(self._file)
        except OSError:
            seen = None  # on a shared volume it may be out of sight for a moment
        if self._run is None:
            self._run = self._load()
        elif seen is not None and seen != self._seen:
            self._run = self._edited(self._run)
        self._seen = seen or self._seen
        return self._run

    def _load(self) -> HeteroRLRun:
        try:
            content = self._files.read(self._file)
        except FileNotFoundError:
            raise RunFolderError(
                f"{self._root} is not a run folder: {self._file} is missing; start with `heterorl run`"
            ) from None
        try:
            run = HeteroRLRun.model_validate_json(content)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise RunFolderError(
                f"{self._file} is not a manifest that this version of HeteroRL can read"
                f" ({where}{': ' if where else ''}{first['msg']}); correct it, or continue with the version that"
                " wrote it"
            ) from error
        return inline_traces(run, self._root)

    def _edited(self, held: HeteroRLRun) -> HeteroRLRun:
        try:
            found = self._load()
            run = take_over(held, found)
        except (HeteroRLError, ValueError, OSError) as error:
            log.error("%s was edited and cannot be used (%s); it is ignored", self._file, error)
            return held
        differing = list(changes(held, found))
        for refused, message in ((False, "follows an edit of"), (True, "keeps until its restart the old")):
            paths = [".".join(path) for path, was, is_ in differing if is_refused_live(path, was, is_) == refused]
            if paths:
                log.log(logging.WARNING if refused else logging.INFO, "this process %s %s", message, ", ".join(paths))
        return run
