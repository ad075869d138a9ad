"""`make bench-quick`: every gate passes, and no ratio to a peer has grossly regressed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_ours_and_the_peers_agree_and_no_ratio_is_grossly_worse_than_its_target(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bench", "--quick", "--dir", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=800)
    print(result.stdout, result.stderr)
    assert result.returncode == 0
    assert list(tmp_path.iterdir()) == []
