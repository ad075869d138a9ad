"""Fixtures of the tests that start processes."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

from heterorl_learner.publish import Publisher

PATIENCE_MS = 60_000


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium; where there is none the test skips, under HETERORL_REQUIRE=all it fails."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        reason = "there is no Chromium; apt-get install chromium"
        (pytest.fail if os.environ.get("HETERORL_REQUIRE") == "all" else pytest.skip)(reason)
    sync_api.expect.set_options(timeout=PATIENCE_MS)
    with sync_api.sync_playwright() as playwright:
        # as root, in a container, its sandbox cannot be set up
        chromium = playwright.chromium.launch(
            executable_path=program, args=["--no-sandbox", "--disable-dev-shm-usage"], timeout=PATIENCE_MS
        )
        yield chromium
        chromium.close()


@pytest.fixture
def every_version_is_published(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests whose steps are faster than a slow disk: no version is left out because an earlier one is still written."""
    publish = Publisher.publish

    def publish_and_wait(publisher: Publisher, step: int) -> float:
        blocked_s = publish(publisher, step)
        publisher.wait()
        return blocked_s

    monkeypatch.setattr(Publisher, "publish", publish_and_wait)
