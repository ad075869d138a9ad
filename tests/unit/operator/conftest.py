"""Fixtures of the operator's tests."""

import pytest

from heterorl_operator.cache import ObjectCache
from heterorl_operator.workqueue import WorkQueue


@pytest.fixture
def cache() -> ObjectCache:
    return ObjectCache()


@pytest.fixture
def queue() -> WorkQueue:
    return WorkQueue()
