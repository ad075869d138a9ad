"""The JSON files of the exchange as models: everything that is read from the volume passes through one of them.

Readers ignore fields that they do not know, so a later version may add some. A later version that changes what a field
means raises `heterorl.exchange.PROTOCOL`; a record with a higher one is refused as such and never taken for damage.
"""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PlainSerializer,
    PlainValidator,
    PositiveInt,
    TypeAdapter,
    ValidationError,
    model_validator,
)
from pydantic_core import from_json

from heterorl.errors import CorruptFile, UnknownProtocol
from heterorl.exchange import PROTOCOL
from heterorl.exchange.adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from heterorl.exchange.canary import Canary
from heterorl.exchange.rollout import RolloutName
from heterorl.exchange.version import Version

WEIGHTS_FILE = "model.safetensors"
"""Of a version: the whole weights."""
BARREN_GROUPS = 64
"""After so many groups in a row without a difference in reward, a slot says that there is nothing to learn from."""


def _parsed_by(kind: type[Any]) -> PlainValidator:
    """A name on the volume as a field: text in the file, the parsed name in the model."""
    return PlainValidator(lambda value: value if isinstance(value, kind) else kind.parse(value))


_Version = Annotated[Version, _parsed_by(Version), PlainSerializer(str)]
_RolloutName = Annotated[RolloutName, _parsed_by(RolloutName), PlainSerializer(str)]


class Record(BaseModel):
    """A JSON file, or a line of one."""

    model_config = ConfigDict(frozen=True, strict=True, extra="ignore", allow_inf_nan=False, ser_json_inf_nan="null")

    protocol: int = PROTOCOL

    def to_bytes(self) -> bytes:
        """The file's contents."""
        return self.model_dump_json().encode()


# ── manifests of published folders ───────────────────────────────────────────────────────────────────────────────────
def _inside(name: str) -> str:
    path = PurePosixPath(name)
    if not name or path.is_absolute() or ".." in path.parts or str(path) != name or "\0" in name:
        raise ValueError(f"{name!r} is not a file inside the folder")
    return name


class FileEntry(BaseModel):
    """What a file of a published folder has to be."""

    model_config = ConfigDict(frozen=True)

    bytes: NonNegativeInt
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Manifest(Record):
    """Written last into a published folder: its files, relative to it. Of one of the kinds below."""

    kind: str
    time: float
    """When it was published, in seconds by the learner's clock."""
    step: NonNegativeInt
    files: Annotated[dict[Annotated[str, AfterValidator(_inside)], FileEntry], Field(min_length=1)]


class DeltaBase(BaseModel):
    """The weights that a delta changes."""

    model_config = ConfigDict(frozen=True)

    version: _Version
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    """Of their model.safetensors."""


class WeightsManifest(Manifest):
    """Of a version: an anchor holds the weights whole, a delta only ways to make them of earlier versions'.

    An anchor may hold such ways as well, for readers that have an earlier version already. An adapter holds what LoRA
    trained, for readers that have the starting model.
    """

    kind: Literal["anchor", "delta", "adapter"] = "anchor"
    model: str | None = None
    """Of an adapter: the digest of the starting model that it belongs to (`ModelOrigin.digest`)."""
    rebuilt: FileEntry | None = None
    """Of a delta: what model.safetensors is once it is rebuilt, whichever way that went."""
    deltas: dict[str, DeltaBase] = {}
    """Files of the folder that each change the weights of an earlier version into these."""

    @property
    def weights(self) -> FileEntry:
        """What model.safetensors of this version is, in the folder or rebuilt."""
        return self.rebuilt or self.files[WEIGHTS_FILE]

    @model_validator(mode="after")
    def _leads_to_weights(self) -> Self:
        if missing := self.deltas.keys() - self.files.keys():
            raise ValueError(f"the manifest does not list {', '.join(sorted(missing))}")
        needed = {"anchor": {WEIGHTS_FILE}, "delta": set(), "adapter": {ADAPTER_CONFIG, ADAPTER_WEIGHTS}}[self.kind]
        if lacking := needed - self.files.keys():
            raise ValueError(f"the manifest does not list {', '.join(sorted(lacking))}")
        if self.kind == "delta" and not (self.rebuilt and self.deltas):
            raise ValueError("a delta has to say what it changes and what comes of it")
        return self


class CheckpointManifest(Manifest):
    """Of a checkpoint, with the learner's small state."""

    kind: Literal["checkpoint"] = "checkpoint"
    incarnation: NonNegativeInt = 0
    """Of the learner that made it."""
    state: dict[str, Any]


# ── the learner ──────────────────────────────────────────────────────────────────────────────────────────────────────
class Incarnation(Record):
    """Claims an incarnation of the learner. Host, process and time are for people; that the file exists counts."""

    id: str
    launcher: str = ""
    """Who started this learner, and starts it again when it ends; empty where nobody does."""
    host: str
    pid: int
    time: float
    clock_ahead_s: float | None = None
    """How far its host's clock was ahead of the file server's (`RunFolder.clock_ahead_s`)."""


class JournalEntry(Record):
    """What one learner step trains on."""

    step: NonNegativeInt
    incarnation: PositiveInt
    names: list[_RolloutName]
    """Rollouts trained in this step; none yet in the line that says that its first ones were poison."""
    dropped: list[_RolloutName] = []
    """Rollouts left out when this step was selected: too old, or made with other rewards or prompts."""
    mismatched: NonNegativeInt = 0
    """How many of the dropped ones were made with other rewards or prompts than the run had by then."""
    poisoned: list[_RolloutName] = []
    """Rollouts that were selected for this step first, and whose loss or gradient was not finite; in quarantine."""


class LearnerHeartbeat(Record):
    """How far the learner is."""

    step: NonNegativeInt
    steps: NonNegativeInt = 0
    incarnation: NonNegativeInt = 0
    version: _Version | None = None
    """The newest that it published."""
    checkpoint_step: int | None = None
    taken: dict[str, int] = {}
    """The last sequence number that was trained or dropped, by slot."""
    waiting: dict[str, int] = {}
    """Rollouts that are there and not too old, by slot, as of the last look."""
    late: dict[str, int] = {}
    """Those of them whose number is below the last one taken: of a slot, groups are finished in any order."""
    dropped: int = 0
    finished: bool = False
    """The last step is trained and the output written."""
    reward: float | None = None
    """Mean reward of the last step."""
    lag: float | None = None
    """Mean lag of the last step's rollouts, in steps."""
    time: float = 0.0
    """When it was written, by the learner's clock."""


AttemptOutcome = Literal["clean", "signalled", "crashed"]


class Attempt(Record):
    """One start of the ranks of one of the learner's pods (`heterorl.exchange.crash_budget`)."""

    run: str
    """Id of the run: the volume may have seen another one before."""
    pod: str
    """Uid of the pod."""
    started: float
    ended: float | None = None
    outcome: AttemptOutcome | None = None
    code: int | None = None
    """Exit code of the ranks; None if it is unknown."""
    message: str = ""
    """The last line of the ranks' log."""
    step: int = 0
    """Steps trained when it ended."""
    resumes: int = 0
    """`failurePolicy.resumes` when it started."""
    found_later: bool = False
    """The end was not recorded when it came: it lies somewhere between `started` and `ended`."""


# ── slots ────────────────────────────────────────────────────────────────────────────────────────────────────────────
class LeaseFile(Record):
    """Claims a slot. Written once, by the process that created it."""

    id: str = ""
    host: str = ""
    boot: str = ""
    """Boot id of the host: a process id means something only within it."""
    pid: Annotated[int, Field(ge=0, le=2**31 - 1)] = 0
    started: int | None = None
    """When that process started, in clock ticks since the boot."""
    first_seq: NonNegativeInt
    """The first sequence number of this epoch: numbers from here on are no longer the predecessor's to use."""


class PromptEvidence(BaseModel):
    """What came of a slot's prompts, for the adaptive order (`heterorl_sampler.adaptive_order`)."""

    model_config = ConfigDict(frozen=True)

    reward_range: tuple[float, float] | None = None
    """Lowest and highest reward so far."""
    seen: dict[int, tuple[float, float, int]] = {}
    """By the row's place in the data: completions and the sum of their rewards, both faded, and as of which step."""


class SlotState(Record):
    """What a slot's next holder has to know."""

    next_seq: NonNegativeInt
    left: list[NonNegativeInt] = []
    """Smaller numbers that a holder handed out and, at the orderly end of its work, has not used: its last word."""
    adoption: dict[str, Any] = {}
    """Of the delay policy (`heterorl.heterogeneity.delay.Adoption.state`)."""
    prompts: PromptEvidence = PromptEvidence()
    """Of the prompt order."""


class SlotStatus(Record):
    """What a sampler shows of itself."""

    model_config = ConfigDict(frozen=False)

    state: str = ""
    """What it does: starting, generating, waiting: queue, stopped, ..."""
    version: str | None = None
    """The weights it serves."""
    version_step: int | None = None
    fetching: _Version | None = None
    """The weights that it is copying: neither they nor what leads to them are retired meanwhile."""
    rollouts: int = 0
    """Groups that the slot has generated."""
    swaps: int = 0
    rejected: int = 0
    """Versions that it refused."""
    refused: dict[str, str] = {}
    """Those of them that are still published, and why."""
    unrewarded: int = 0
    """Groups that were left out because a reward failed on them."""
    reward_failures: dict[str, int] = {}
    """Failed calls of rewards, retried ones too, by reward and kind: `judge/time`; error, time, memory or crash."""
    filtered: int = 0
    """Groups that were left out because all their rewards are equal (`algorithm.filterGroups`)."""
    filtered_in_a_row: int = 0
    """Those since the last group that was not."""
    idle_s: float = 0.0
    """Seconds since something came of its work."""
    reward: float | None = None
    tokens_per_s: float | None = None
    pending: int = 0
    """Its rollouts that wait for the learner."""
    made: int = 0
    """Groups of its version that it has published, trained or not."""
    promised: int = 0
    """Those, and what it is making of that version: online, other samplers need not make them."""
    canary_mean_abs_diff: float | None = None
    """Of the version it serves (`heterorl.exchange.canary`)."""

    @property
    def trouble(self) -> str | None:
        """Why nothing comes of its work for the learner, though it goes on."""
        if self.filtered_in_a_row < BARREN_GROUPS:
            return None
        return "all rewards are equal within each of its latest groups, which algorithm.filterGroups leaves out"


class SlotHeartbeat(SlotStatus):
    """The status, and that the lease is kept."""

    epoch: PositiveInt
    beats: NonNegativeInt
    released: bool = False
    time: float = 0.0


# ── preparation and evaluation ───────────────────────────────────────────────────────────────────────────────────────
class ModelOrigin(Record):
    """Where the starting model came from."""

    source: str
    digest: str
    supervised_steps: int | None = None
    held_out_accuracy: float | None = None


class DataCount(Record):
    """Problems of one dataset."""

    rows: NonNegativeInt
    skipped: NonNegativeInt
    bad: dict[str, NonNegativeInt] = {}
    """Rows that cannot be used and were left out, by reason."""
    digest: str = ""
    """SHA-256 of its file."""


class Prepared(Record):
    """Model and data are complete."""

    run: str
    """Id of the run that they were prepared for."""
    model: ModelOrigin | None = None
    data: dict[str, DataCount] = {}


class Evaluation(Record):
    """Results of one version."""

    average: float
    """Mean over the sets of their mean@k."""
    sets: dict[str, dict[str, float]] = {}
    """Metrics by the set's label."""

    @property
    def metrics(self) -> dict[str, float]:
        """Those of all sets under the names that they are logged by, `eval/LABEL/METRIC`."""
        return {f"eval/{label}/{key}": value for label, found in self.sets.items() for key, value in found.items()}


class RunnerState(Record):
    """What outlives the local runner: how the run went, for how long, what was restarted."""

    model_config = ConfigDict(frozen=False)

    status: str
    """preparing, running, succeeded, stopped or failed."""
    reason: str = ""
    prepare_s: float = 0.0
    elapsed_s: float = 0.0
    """Time since the samplers were first allowed to start, without the time between stop and resume."""
    restarts: dict[str, int] = {}


class BoardId(Record):
    """What the run is called on dashboards."""

    id: str


class QuarantineNote(Record):
    """Why a file or folder was put aside."""

    reason: str
    came_from: str
    """Path below the run's folder."""
    time: float


_R = TypeVar("_R", bound=Record)
_KINDS = ("anchor", "delta", "adapter", "checkpoint")


def parse_record(model: type[_R], data: bytes, what: str) -> _R:
    """The record in a file's contents; `what` names the file in messages.

    Raises UnknownProtocol when a later version of HeteroRL may have written it, and CorruptFile when no version did.
    """
    found = _json_object(data, what)
    protocol, kind = found.get("protocol"), found.get("kind")
    if isinstance(protocol, int) and protocol > PROTOCOL:
        raise UnknownProtocol(what, f"protocol {protocol}", f"protocol {PROTOCOL}")
    if issubclass(model, Manifest) and protocol == PROTOCOL and isinstance(kind, str) and kind not in _KINDS:
        raise UnknownProtocol(what, f"kind {kind!r}", " and ".join(_KINDS))
    try:
        record = model.model_validate_json(data)
    except ValidationError as error:
        raise CorruptFile(f"{what}: {_first_of(error)}") from error
    if record.protocol != PROTOCOL:
        raise CorruptFile(f"{what}: there never was a protocol {record.protocol}")
    return record


def parse_canary(data: bytes, what: str) -> Canary:
    """The canary in a file's contents, whose digest the manifest has vouched for; CorruptFile when it is none."""
    try:
        return _CANARY.validate_json(data)
    except ValidationError as error:
        raise CorruptFile(f"{what}: {_first_of(error)}") from error


_CANARY = TypeAdapter(Canary)


def _json_object(data: bytes, what: str) -> dict[str, Any]:
    try:
        found = from_json(data)
    except ValueError as error:
        raise CorruptFile(f"{what} is not JSON: {error}, found {data[:40]!r}") from error
    if not isinstance(found, dict):
        raise CorruptFile(f"{what} is not a JSON object: found {data[:40]!r}")
    return found


def _first_of(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    place = ".".join(map(str, first["loc"]))
    return f"{place}: {first['msg']}" if place else first["msg"]
