"""Slots and their leases: who samples in which place, and that a holder who lost it changes nothing.

A holder asks before each write whether a later epoch has begun. It may be frozen between asking and writing; therefore
nothing that it writes then does harm: its state has a file of its own for each epoch, its heartbeat says which epoch it
belongs to, and the learner refuses its rollouts (`check_epoch`).
"""

from __future__ import annotations

import os
import re
import socket
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from heterorl.errors import CorruptFile, Superseded
from heterorl.exchange.record_store import RecordStore
from heterorl.exchange.records import LeaseFile, SlotHeartbeat, SlotState, SlotStatus
from heterorl.exchange.rollout import RolloutName
from heterorl.exchange.storage import Files
from heterorl.spec.run import Slot

_FILE = re.compile(r"(lease|state)-([0-9]{8,})\.json|(heartbeat)\.json")
_KEPT_LEASES = 100
"""How many epochs back the learner can check whether a rollout was made while its lease lasted."""


@dataclass
class Lease:
    """A slot held by this process; `beat` keeps it."""

    slot: Slot
    epoch: int
    first_seq: int = 0
    """The next sequence number."""
    beats: int = 0


class Slots:
    """The slots of one run's folder."""

    def __init__(self, folder: Path, files: Files, records: RecordStore, clock: Callable[[], float]) -> None:
        self._folder, self._files, self._records, self._now = folder, files, records, clock
        self._seen: dict[Slot, tuple[tuple[int, int], float, float]] = {}
        self._first_seqs: dict[tuple[Slot, int], int] = {}

    # ── leases ───────────────────────────────────────────────────────────────────────────────────────────────────────
    def try_lease(self, slot: Slot, next_seq: Callable[[Slot], int], lease_s: float) -> Lease | None:
        """Lease a slot if it is free. `next_seq` finds the first number that cannot have been used."""
        epoch = self.epoch(slot)
        if not self._is_free(slot, epoch, lease_s):
            return None
        self._files.make_dir(self.folder(slot))
        claim = LeaseFile(
            id=uuid.uuid4().hex,
            host=socket.gethostname(),
            boot=_boot_id(),
            pid=os.getpid(),
            started=_started(os.getpid()),
            first_seq=next_seq(slot),
        )
        try:
            if not self._files.create(self._file(slot, "lease", epoch + 1), claim.to_bytes()):
                return None
        except FileNotFoundError:  # who was first has swept what we had staged
            return None
        lease = Lease(slot, epoch + 1, next_seq(slot))  # asked again: what appeared meanwhile keeps its number
        state = self.load(slot) or SlotState(next_seq=0)
        self.save(lease, state.model_copy(update={"next_seq": lease.first_seq}))
        self._sweep(lease)
        return lease

    def epoch(self, slot: Slot) -> int:
        """The epoch of the slot's last lease; 0 before the first."""
        return max(self._epochs(slot, "lease"), default=0)

    def is_held(self, slot: Slot, lease_s: float) -> bool:
        """Whether a sampler is at work in the slot, as far as can be seen from here."""
        return not self._is_free(slot, self.epoch(slot), lease_s)

    @contextmanager
    def held(self, lease: Lease) -> Iterator[None]:
        """Write as the slot's holder; Superseded, with nothing written, for one that is no longer."""
        self._require(lease)
        try:
            yield
        except FileNotFoundError:  # a successor has swept what was staged
            self._require(lease)
            raise

    def _require(self, lease: Lease) -> None:
        if (epoch := self.epoch(lease.slot)) > lease.epoch:
            raise Superseded(
                f"slot {lease.slot} was taken over by another sampler (its lease has epoch {epoch}, this one"
                f" {lease.epoch}); this sampler leaves and writes nothing more"
            )

    def check_epoch(self, name: RolloutName, epoch: int) -> None:
        """CorruptFile for a rollout that was made under a lease that was over by then.

        An epoch's numbers end where the next one's begin, which the next one's lease says; so a later number of an
        earlier epoch was made after that epoch's end. `epoch`: as the rollout says. Leases far back are swept; for them
        the oldest that is left stands in.
        """
        for later in sorted(e for e in self._epochs(name.slot, "lease") if e > epoch):
            if (first_seq := self._first_seq(name.slot, later)) is None:
                continue
            if name.seq >= first_seq:
                raise CorruptFile(
                    f"made under lease {epoch} of slot {name.slot}, whose numbers ended when lease {later} began at"
                    f" number {first_seq}"
                )
            return

    def _first_seq(self, slot: Slot, epoch: int) -> int | None:
        if (slot, epoch) not in self._first_seqs:
            lease = self._records.read(self._file(slot, "lease", epoch), LeaseFile)
            if lease is None:
                return None
            self._first_seqs[slot, epoch] = lease.first_seq
        return self._first_seqs[slot, epoch]

    def _is_free(self, slot: Slot, epoch: int, lease_s: float) -> bool:
        if epoch == 0:
            return True
        beat = self._records.read(self._heartbeat(slot), SlotHeartbeat)
        if beat is not None and beat.epoch != epoch:
            beat = None  # a predecessor's
        if beat is not None and beat.released:
            return True
        holder = self._records.read(self._file(slot, "lease", epoch), LeaseFile)
        here = (socket.gethostname(), _boot_id())
        if holder is not None and (holder.host, holder.boot) == here and _started(holder.pid) != holder.started:
            return True
        return self._stood_still_s(slot, (epoch, beat.beats if beat is not None else 0), lease_s) >= lease_s

    def _stood_still_s(self, slot: Slot, mark: tuple[int, int], longest_gap_s: float) -> float:
        """For how long we have seen the slot's heartbeat at this mark, by our clock.

        A longer gap between two looks starts it anew: it was we who stood still, perhaps the whole machine, and the
        holder with us.
        """
        now = self._now()
        last_mark, since, looked = self._seen.get(slot, (None, now, now))
        if mark != last_mark or not 0 <= now - looked <= longest_gap_s:
            since = now
        self._seen[slot] = (mark, since, now)
        return now - since

    def _sweep(self, lease: Lease) -> None:
        """Remove what the slot's earlier holders left: half-written files, their states, and leases of long ago."""
        leases = sorted(self._epochs(lease.slot, "lease"))
        states = [epoch for epoch in self._epochs(lease.slot, "state") if epoch < lease.epoch]
        for path in (
            *self._files.leftovers(self.folder(lease.slot)),
            *(self._file(lease.slot, "state", epoch) for epoch in states),
            *(self._file(lease.slot, "lease", epoch) for epoch in leases[:-_KEPT_LEASES]),
        ):
            self._files.remove(path)

    # ── what a holder writes ─────────────────────────────────────────────────────────────────────────────────────────
    def beat(self, lease: Lease, status: SlotStatus, *, released: bool) -> None:
        """Keep the lease and show the slot's status; Superseded if another sampler has it."""
        lease.beats += 1
        shown = status.model_dump() | {"epoch": lease.epoch, "beats": lease.beats, "released": released}
        with self.held(lease):
            self._records.write(self._heartbeat(lease.slot), SlotHeartbeat(**shown, time=self._now()))

    def heartbeats(self) -> dict[Slot, SlotHeartbeat]:
        """The last heartbeat of every slot that ever had one."""
        slots = self._records.names(self._folder, Slot.parse)
        found = {slot: self._records.read(self._heartbeat(slot), SlotHeartbeat) for slot in slots}
        return {slot: beat for slot, beat in found.items() if beat is not None}

    def save(self, lease: Lease, state: SlotState) -> None:
        """Put what the slot's next holder has to know on the disk; Superseded if that is at work already."""
        with self.held(lease):
            self._records.write(self._file(lease.slot, "state", lease.epoch), state)

    def load(self, slot: Slot) -> SlotState | None:
        """The newest state that can be read."""
        for epoch in sorted(self._epochs(slot, "state"), reverse=True):
            if (state := self._records.read(self._file(slot, "state", epoch), SlotState)) is not None:
                return state
        return None

    # ── places ───────────────────────────────────────────────────────────────────────────────────────────────────────
    def folder(self, slot: Slot) -> Path:
        """Where a slot's files are."""
        return self._folder / str(slot)

    def _heartbeat(self, slot: Slot) -> Path:
        return self.folder(slot) / "heartbeat.json"

    def _file(self, slot: Slot, kind: str, epoch: int) -> Path:
        return self.folder(slot) / f"{kind}-{epoch:08d}.json"

    def _epochs(self, slot: Slot, kind: str) -> list[int]:
        names = self._records.names(self.folder(slot), _parse)
        return [epoch for found, epoch in names if found == kind]


def _parse(name: str) -> tuple[str, int]:
    if not (match := _FILE.fullmatch(name)):
        raise ValueError(name)
    return (match[3], 0) if match[3] else (match[1], int(match[2]))


def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _started(pid: int) -> int | None:
    """When a process of this machine started, in clock ticks since the boot; None if it is gone or a zombie.

    Ticks, because a time of day would change with the clock, and the process would seem to be another one.
    """
    try:
        about = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = about.rpartition(")")[2].split()  # the name before may hold anything
    return None if fields[0] in "ZX" else int(fields[19])
