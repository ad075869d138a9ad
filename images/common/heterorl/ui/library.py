"""Which runs there are: folders with a run.json, as named or up to two levels below the folders that are named."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from heterorl.errors import RunFolderError
from heterorl.logs import shown
from heterorl.ui.run_view import RunView

_LEVELS = 2


class Library:
    """The runs below some folders, each read on from where it was left."""

    def __init__(self, folders: Sequence[Path]) -> None:
        """Raises RunFolderError for a folder that does not exist. One without runs is fine: some may come."""
        for folder in folders:
            if not folder.is_dir():
                raise RunFolderError(f"{folder} is not a folder; name a run's folder, or the folder that holds runs")
        self._folders = [folder.resolve() for folder in folders]
        self._views: dict[str, RunView] = {}
        self._lock = threading.Lock()

    @property
    def places(self) -> list[str]:
        """The folders that are looked into."""
        return [str(folder) if folder == Path.cwd() else shown(folder) for folder in self._folders]

    def runs(self) -> list[RunView]:
        """Every run there is now, by its id."""
        with self._lock:
            found: dict[str, Path] = {}
            for folder in self._folders:
                for root in _run_folders(folder, _LEVELS):
                    name = root.name if root == folder else root.relative_to(folder).as_posix()
                    while name in found and found[name] != root:
                        name += "+"
                    found[name] = root
            self._views = {
                name: self._views[name] if name in self._views else RunView(name, root)
                for name, root in sorted(found.items())
            }
            return list(self._views.values())

    def run(self, name: str) -> RunView:
        """The run of that id; KeyError when there is none."""
        if name not in self._views:
            self.runs()
        return self._views[name]


def _run_folders(folder: Path, levels: int) -> Iterator[Path]:
    if (folder / "run.json").is_file():
        yield folder
        return
    if levels:
        try:
            below = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
        except OSError:
            return
        for path in below:
            yield from _run_folders(path, levels - 1)
