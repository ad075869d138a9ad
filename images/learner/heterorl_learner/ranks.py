"""The ranks of a learner: the only module that speaks torch.distributed. A learner alone calls the same functions.

All ranks call `agree`, `gather`, `barrier` and `part` together and in the same order.

At the end of a process torch's background threads may still be alive when the interpreter is taken down, and one of
them then aborts a process whose work is done. So ranks never take the group down: they `part` over the store that they
met at, which needs no thread of theirs, and leave by `heterorl.entry.leave`.
"""

from __future__ import annotations

import logging
import os
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed import HashStore, Store  # type: ignore[attr-defined]  # bound where stubs do not look
from torch.distributed.rendezvous import rendezvous

log = logging.getLogger(__name__)

_PATIENCE = timedelta(days=1)
"""Rank 0 may wait for rollouts for hours, or write for long, while the others wait for rank 0."""
_FAREWELL = timedelta(minutes=1)
"""How long rank 0, with nothing left to do, waits for the others, which have less to do than it has."""

_store: Store | None = None
_T = TypeVar("_T")


def join(device: torch.device, *, group_of_one: bool) -> None:
    """Meet the other ranks that the environment names, as torchrun sets it; once a process.

    Alone there is no group, but with `group_of_one`, for what insists on one (DeepSpeed).
    """
    global _store
    if dist.is_initialized():
        return
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        _store, number, count = next(rendezvous("env://", timeout=_PATIENCE))
        dist.init_process_group(backend, store=_store, rank=number, world_size=count, timeout=_PATIENCE)
    elif group_of_one:
        os.environ.setdefault("LOCAL_RANK", "0")
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)


def rank() -> int:
    """This rank's number; 0 decides, and alone touches the volume where not all have to."""
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    """How many ranks there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def agree(value: _T) -> _T:
    """Rank 0's value on every rank; what the others give is ignored. Pickled, so of our own types only."""
    if size() == 1:
        return value
    message = [value]
    dist.broadcast_object_list(message)
    return message[0]


def gather(value: _T) -> list[_T]:
    """Every rank's value on every rank, in the order of ranks."""
    if size() == 1:
        return [value]
    values: list[_T] = [value] * size()
    dist.all_gather_object(values, value)
    return values


def barrier() -> None:
    """Return when every rank has come here."""
    if size() > 1:
        dist.barrier()


def part() -> None:
    """Return when no rank needs this one any more: everything is done on all of them. Rank 0, which may keep the store,
    returns last. What goes wrong here is only told, as there is nothing left that could be lost.
    """
    if _store is None:
        return
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()  # this rank's share of the last collective
    others = range(1, size())
    try:
        if rank() == 0:
            _store.wait([f"done-{other}" for other in others], _FAREWELL)
            _store.set("leave", "")
            _store.wait([f"gone-{other}" for other in others], _FAREWELL)
        else:
            _store.set(f"done-{rank()}", "")
            _store.wait(["leave"], _PATIENCE)
            _store.set(f"gone-{rank()}", "")
    except RuntimeError as error:  # torch's own errors of the store are all of this kind
        log.info("not every rank closed its process group: %s", str(error).partition("\n")[0])
