"""What containers run exists: a module that was renamed must not be left behind in a chart or an image."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = [*(ROOT / "charts").rglob("*.yaml"), *(ROOT / "images").glob("*/Dockerfile")]
COMMANDS = {
    (str(path.relative_to(ROOT)), module)
    for path in FILES
    for module in re.findall(r"-m[\"', ]+(heterorl[\w.]*)", path.read_text())
}


def test_commands_are_found_in_the_chart_and_in_every_image_that_has_one():
    assert {"charts/heterorl/templates/tests/helm-test.yaml"} <= {path for path, _ in COMMANDS}


@pytest.mark.parametrize(("path", "module"), sorted(COMMANDS))
def test_every_module_that_a_container_runs_exists(path, module):
    name = module if "." in module else f"{module}.__main__"
    assert importlib.util.find_spec(name) is not None, f"{path} runs {module}"
