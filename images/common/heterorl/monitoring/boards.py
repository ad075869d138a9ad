"""Dashboards: TensorBoard files, Weights & Biases, Trackio. All raise their errors; `background` handles them.

Told(board, story)      adds evaluations, completions and the summary, from the run's folder (`run_story`)
  └─ TensorBoard | WandbRun | TrackioRun
"""

from __future__ import annotations

import importlib.util
import netrc
import os
import socket
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from heterorl.errors import UserError
from heterorl.monitoring.background import Sink
from heterorl.monitoring.json_lines import Record, numbers
from heterorl.monitoring.run_story import RunStory, leaves
from heterorl.spec.run import MonitoringSpec, TrackioSpec, WandbSpec

_FLUSH_S = 2.0
_FOLLOW_S = 10.0
"""How often the run's folder is looked at for what a board is told beside the steps."""
_WANDB = "https://api.wandb.ai"


class Board(Protocol):
    """A dashboard."""

    def write(self, record: Record) -> None:
        """Show the numbers of a step; events are left out."""
        ...

    def show_evaluation(self, record: Record) -> None:
        """Show the results of an evaluation, as numbers of the step that was evaluated."""
        ...

    def show_completions(self, rows: Sequence[Record]) -> None:
        """Show a table of completions, the newest last."""
        ...

    def summarise(self, summary: Mapping[str, Any]) -> None:
        """Show the run in numbers; the last call stands."""
        ...

    def close(self) -> None:
        """Hand over what is left."""
        ...


class Told:
    """A board that is told the run's story as well."""

    def __init__(self, board: Board, story: RunStory) -> None:
        self._board, self._story = board, story
        self._looked_at = time.monotonic()

    def write(self, record: Record) -> None:
        """Hand a step's numbers on and, now and then, what else there is."""
        self._board.write(record)
        if time.monotonic() - self._looked_at >= _FOLLOW_S:
            self._follow(last=False)

    def close(self) -> None:
        """Tell the rest, and the run in numbers."""
        try:
            self._follow(last=True)
            self._board.summarise(self._story.summary())
        finally:
            self._board.close()

    def _follow(self, *, last: bool) -> None:
        self._looked_at = time.monotonic()
        for record in self._story.evaluations():
            self._board.show_evaluation(record)
        if rows := self._story.completions(last=last):
            self._board.show_completions(rows)


def told(open_board: Callable[[Any], Board], story: Callable[[], RunStory] | None) -> Sink:
    """A new board, told a new story if there is one."""
    if story is None:
        return open_board(None)
    its_own = story()
    return Told(open_board(its_own), its_own)


class TensorBoard:
    """Scalars by step; a sampler's batches are numbered as they come.

    tensorboardX's own SummaryWriter writes on a thread that dies silently of a full disk, and then blocks its caller.
    """

    def __init__(self, folder: Path, story: RunStory | None = None) -> None:
        """With a story, the run's settings are shown as well."""
        from tensorboardX.record_writer import RecordWriter

        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{os.getpid()}.{time.monotonic_ns()}"
        self._path, self._story = folder / name, story
        self._file = RecordWriter(str(self._path))
        self._batches, self._flushed, self._begun, self._kept = 0, time.monotonic(), False, False
        self._put(time.time(), file_version="brain.Event:2")

    def write(self, record: Record) -> None:
        """Write a step's numbers; events are left out."""
        if "event" in record:
            return
        self._batches += 1
        step = record.get("step", self._batches)
        if not self._begun:
            self._begin(step, record["time"])
        self._put_numbers(step, record)
        if time.monotonic() - self._flushed >= _FLUSH_S:
            self._flush()

    def show_evaluation(self, record: Record) -> None:
        """As numbers of the step that was evaluated."""
        self._put_numbers(record["step"], record)

    def show_completions(self, rows: Sequence[Record]) -> None:
        """As text."""
        from tensorboardX.summary import text

        shown = text("completions", "\n\n".join(map(_paragraph, rows)))
        self._put(time.time(), step=rows[-1]["step"], summary=shown)

    def summarise(self, summary: Mapping[str, Any]) -> None:
        """As text."""
        from tensorboardX.summary import text

        if summary:
            self._put(time.time(), step=summary.get("steps", 0), summary=text("summary", _as_table(summary)))

    def close(self) -> None:
        """Flush and close the file; one of which the disk took nothing is removed."""
        try:
            self._flush()
        finally:
            if not self._kept:
                self._path.unlink(missing_ok=True)
            self._file.close()

    def _flush(self) -> None:
        self._file.flush()
        self._flushed, self._kept = time.monotonic(), True

    def _begin(self, step: int, at: float) -> None:
        """A new file hides what earlier ones say of this and later steps: a resumed run repeats them."""
        from tensorboardX.proto.event_pb2 import SessionLog
        from tensorboardX.summary import hparams, text

        self._put(at, step=step, session_log=SessionLog(status=SessionLog.START))
        self._begun = True
        if self._story is not None:
            settings = self._story.settings
            shown = [text("settings", _as_table(settings)), *hparams(dict(leaves(settings)), {"reward": 0})]
            for summary in shown:
                self._put(at, step=step, summary=summary)

    def _put_numbers(self, step: int, record: Record) -> None:
        from tensorboardX.proto.summary_pb2 import Summary

        shown = [(key, value) for key, value in numbers(record) if key not in ("step", "time")]
        values = [Summary.Value(tag=key, simple_value=value) for key, value in shown]
        self._put(record["time"], step=step, summary=Summary(value=values))

    def _put(self, at: float, **what: Any) -> None:
        from tensorboardX.proto.event_pb2 import Event

        self._file.write(Event(wall_time=at, **what).SerializeToString())


def _as_table(tree: Mapping[str, Any]) -> str:
    """Settings or a summary in Markdown."""
    return "\n".join(["| | |", "|---|---|", *(f"| {path} | {value} |" for path, value in leaves(tree))])


def _paragraph(row: Record) -> str:
    """A completion in Markdown, its text as it is."""
    about = ", ".join(
        f"{key} {row[key]}" for key in row if key not in ("prompt", "completion") and row[key] is not None
    )
    quoted = "\n".join(f"    {line}" for key in ("prompt", "completion") for line in f"{key}: {row[key]}".splitlines())
    return f"**{about}**\n\n{quoted}"


class WandbRun:
    """One W&B run, found again by its id when the run resumes. Variables of wandb go before the spec's fields."""

    def __init__(self, folder: Path, settings: WandbSpec, story: RunStory) -> None:
        import wandb

        folder.mkdir(parents=True, exist_ok=True)
        self._wandb = wandb
        try:
            self._run = wandb.init(
                config=story.settings,
                allow_val_change=True,  # what may change during a run may have changed since its last start
                mode=wandb_mode(settings),
                reinit="create_new",
                **_unless_set(
                    WANDB_PROJECT=settings.project,
                    WANDB_ENTITY=settings.entity,
                    WANDB_NAME=settings.name or story.name,
                    WANDB_RUN_GROUP=settings.group,
                    WANDB_TAGS=settings.tags,
                    WANDB_NOTES=settings.notes,
                    WANDB_RUN_ID=settings.id or story.id,
                    WANDB_RESUME="allow",
                    WANDB_DIR=str(folder),
                    WANDB_QUIET={"console": "off", "quiet": True},
                ),
            )
        except Exception:
            wandb.teardown()  # its process keeps the id of a run that it could not begin, and would refuse the next try
            raise
        # Our own axis: W&B's counter refuses to go back, and a resumed run repeats steps.
        self._run.define_metric("*", step_metric="step")

    def write(self, record: Record) -> None:
        """Log the numbers of a step; events are left out."""
        if "event" not in record:
            self._run.log(dict(numbers(record)))

    def show_evaluation(self, record: Record) -> None:
        """As numbers of the step that was evaluated."""
        self.write(record)

    def show_completions(self, rows: Sequence[Record]) -> None:
        """As a table."""
        columns = list(rows[0])
        data = [[row.get(key) for key in columns] for row in rows]
        table = self._wandb.Table(columns=[*columns], data=data, allow_mixed_types=True)
        self._run.log({"step": rows[-1]["step"], "completions": table})

    def summarise(self, summary: Mapping[str, Any]) -> None:
        """As the run's summary."""
        self._run.summary.update({**summary, "step": summary.get("steps", 0)})

    def close(self) -> None:
        """Upload what is left."""
        try:
            self._run.finish()
        finally:
            self._wandb.teardown()  # as after a run that could not begin, where this is closed because of an error


_WANDB_ARGUMENTS = {
    "WANDB_PROJECT": "project",
    "WANDB_ENTITY": "entity",
    "WANDB_NAME": "name",
    "WANDB_RUN_GROUP": "group",
    "WANDB_TAGS": "tags",
    "WANDB_NOTES": "notes",
    "WANDB_RUN_ID": "id",
    "WANDB_RESUME": "resume",
    "WANDB_DIR": "dir",
    "WANDB_QUIET": "settings",
}
"""By its variable, the argument of `wandb.init` that would go before it."""


def _unless_set(**values: Any) -> dict[str, Any]:
    """Arguments of `wandb.init` with these values, but for those whose variable is set."""
    return {_WANDB_ARGUMENTS[name]: value for name, value in values.items() if not os.environ.get(name)}


class TrackioRun:
    """One run of Trackio, found again by its name; in the files of TRACKIO_DIR, on a Space or on a server."""

    def __init__(self, settings: TrackioSpec, story: RunStory) -> None:
        import trackio

        self._trackio = trackio
        self._run: Any = trackio.init(
            project=str(settings.project),
            name=settings.name or story.id,
            group=settings.group,
            space_id=settings.space,
            config=dict(leaves(story.settings)),
            resume="allow",
            embed=False,
        )

    def write(self, record: Record) -> None:
        """Log the numbers of a step; events are left out."""
        if "event" not in record:
            self._log(record["step"], numbers(record))

    def show_evaluation(self, record: Record) -> None:
        """As numbers of the step that was evaluated."""
        self.write(record)

    def show_completions(self, rows: Sequence[Record]) -> None:
        """As a table."""
        from pandas import DataFrame

        table = self._trackio.Table(dataframe=DataFrame(rows))
        self._run.log({"completions": table}, step=rows[-1]["step"])

    def summarise(self, summary: Mapping[str, Any]) -> None:
        """As numbers of the last step."""
        found = numbers({f"summary/{path}": value for path, value in leaves(summary)})
        self._log(summary.get("steps", 0), found)

    def close(self) -> None:
        """Write, or upload, what is left."""
        self._run.finish()

    def _log(self, step: int, values: Iterable[tuple[str, float]]) -> None:
        if found := {key: value for key, value in values if key not in ("step", "time")}:
            self._run.log(found, step=step)


def wandb_mode(settings: WandbSpec) -> Any:
    """online, offline or disabled: WANDB_MODE, or what the spec says."""
    mode = os.environ.get("WANDB_MODE") or settings.mode
    return "offline" if mode == "dryrun" else mode


def check_boards(monitoring: MonitoringSpec) -> None:
    """Refuse a dashboard that is configured and cannot work: not installed, or without a key. Asks no server."""
    if monitoring.trackio.project and importlib.util.find_spec("trackio") is None:
        raise UserError(
            "monitoring.trackio.project is set, but trackio is not installed; pip install 'heterorl[trackio]', or"
            " remove the project"
        )
    _check_wandb(monitoring.wandb)


def _check_wandb(settings: WandbSpec) -> None:
    if not settings.project or wandb_mode(settings) == "disabled":
        return
    if importlib.util.find_spec("wandb") is None:
        raise UserError(
            "monitoring.wandb.project is set, but wandb is not installed; pip install wandb, or remove the project"
        )
    if wandb_mode(settings) == "online" and not _has_key():
        raise UserError(
            "monitoring.wandb.project is set, but there is no API key of Weights & Biases; set WANDB_API_KEY (on"
            " Kubernetes credentials.wandbApiKey), or mode: offline, or remove the project"
        )


def _has_key() -> bool:
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or _WANDB).netloc
    named = os.environ.get("NETRC")
    for path in [Path(named).expanduser()] if named else [Path.home() / ".netrc", Path.home() / "_netrc"]:
        with suppress(OSError, netrc.NetrcParseError):
            if (found := netrc.netrc(path).authenticators(host)) and found[2]:
                return True
    return False
