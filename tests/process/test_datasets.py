"""Datasets in a process of their own: settings that the Hub's libraries read when they are imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def test_a_hub_data_set_that_cannot_be_reached_is_one_clear_line(tmp_path: Path) -> None:
    script = (
        "from pathlib import Path; from heterorl.data.datasets import load_rows; from heterorl.spec.run import DatasetSpec\n"
        "from heterorl.errors import DataError\n"
        "try: load_rows(DatasetSpec(source='hub', name='openai/gsm8k', config='main'), Path())\n"
        "except DataError as error: print(error)\n"
    )
    offline = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=offline, check=True)
    (line,) = done.stdout.splitlines()
    assert line.startswith("openai/gsm8k: the dataset could not be loaded from the Hub (")
    assert line.endswith("or download it and set source: file")
    assert "Traceback" not in done.stderr
