"""What a watch reports reaches the cache and the queue, nothing else."""

from __future__ import annotations

import asyncio

import kopf
import pytest
from kopf._cogs.structs.references import Resource
from kopf._core.actions.lifecycles import get_default_lifecycle
from kopf._core.engines.indexing import OperatorIndexers
from kopf._core.reactor.processing import process_resource_event

from heterorl_operator import handlers
from heterorl_operator.apply import Applier
from heterorl_operator.handlers import NoMemories, Watcher, registry_for, settings
from heterorl_operator.resources import DEPLOYMENT, LABELLED, RUN
from unit.operator.operator_world import CREATED, KEY, FakeApi, body, run_body


@pytest.fixture
def watcher(cache, queue, monkeypatch):
    monkeypatch.setattr(handlers, "_BATCH_S", 0.02)
    return Watcher(cache, queue, Applier(FakeApi(), cache).object_deleted)


def deployment(version, **fields):
    return body("Deployment", "run-sampler-near", version, **fields)


def test_changes_are_cached_and_queued_and_known_states_are_not(watcher, cache, queue):
    assert watcher.handle(DEPLOYMENT, "ADDED", deployment(3))
    queue.done(queue.get()[0])
    assert not watcher.handle(DEPLOYMENT, None, deployment(3))  # the list of a watch that was renewed
    assert len(queue) == 0
    assert watcher.handle(DEPLOYMENT, "MODIFIED", deployment(4))
    assert queue.get()[0] == KEY


def test_a_deletion_is_cached_and_queued(watcher, cache, queue):
    watcher.handle(DEPLOYMENT, "ADDED", deployment(3))
    queue.done(queue.get()[0])
    assert watcher.handle(DEPLOYMENT, "DELETED", deployment(4))
    assert cache.children(KEY) == {}
    assert queue.get()[0] == KEY


def test_an_edit_of_a_run_is_queued_at_once_and_a_burst_of_its_objects_once(watcher, queue, monkeypatch):
    monkeypatch.setattr(handlers, "_BATCH_S", 30.0)
    for version in (3, 4, 5):
        watcher.handle(DEPLOYMENT, "MODIFIED", deployment(version))
    assert len(queue) == 0  # not yet
    watcher.handle(RUN, "MODIFIED", run_body(version=6))
    assert queue.get()[0] == KEY


def test_what_belongs_to_no_run_is_left(watcher, queue):
    assert not watcher.handle(DEPLOYMENT, "ADDED", body("Deployment", "theirs", run=None))
    assert len(queue) == 0


def test_every_kind_has_a_handler_that_leaves_nothing_on_the_object(watcher, cache):
    registry = registry_for(watcher, (RUN, *LABELLED))
    watching = registry._watching.get_all_handlers()
    assert [handler.id for handler in watching] == [f"on-{kind.plural}" for kind in (RUN, *LABELLED)]
    assert not registry._changing.get_all_handlers()  # those would add an annotation or a finalizer
    assert not registry._spawning.get_all_handlers()
    assert not registry._indexing.get_all_handlers()  # 10,000 objects would hold every handler up
    asyncio.run(watching[0].fn(event={"type": None, "object": run_body()}))
    assert cache.run(KEY).created == CREATED


def test_kopf_hands_events_on_and_remembers_none_of_the_objects(watcher, cache):
    registry, memories = registry_for(watcher, [RUN]), NoMemories()
    resource = Resource(RUN.group, RUN.version, RUN.plural, kind=RUN.name, namespaced=True)

    async def report(event_type, version):
        await process_resource_event(
            lifecycle=get_default_lifecycle(),
            indexers=OperatorIndexers(),
            registry=registry,
            settings=settings(),
            memories=memories,
            memobase=kopf.Memo(),
            resource=resource,
            raw_event={"type": event_type, "object": run_body(version=version)},
            event_queue=asyncio.Queue(),
        )

    asyncio.run(report(None, 6))
    asyncio.run(report("MODIFIED", 7))
    assert cache.run(KEY).resource_version == 7
    assert watcher.event_counts[RUN.name] == 2
    assert not list(memories.iter_all_memories())
    asyncio.run(report("DELETED", 8))
    assert cache.run(KEY) is None


def test_watches_end_are_renewed_and_bring_only_what_carries_a_runs_label():
    chosen = settings()
    assert isinstance(chosen, kopf.OperatorSettings)
    assert chosen.scanning.disabled
    assert not chosen.posting.enabled
    assert chosen.watching.server_timeout < chosen.watching.client_timeout
    watched = {(each.group, each.version, each.any_name) for each in chosen.watching.label_selectors}
    assert watched == {(kind.group, kind.version, kind.plural) for kind in LABELLED}
    assert set(chosen.watching.label_selectors.values()) == {"heterorl.dev/run"}
