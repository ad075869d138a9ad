"""`heterorl push` up to the Hub: what would be uploaded, and what is refused."""

from pathlib import Path

import pytest

from builders import exchange_at
from heterorl.cli import main


@pytest.fixture
def run(tmp_path: Path) -> Path:
    exchange_at(tmp_path / "run")
    for folder, size in (("output", 5), ("checkpoints/step-00000050/model", 7)):
        (tmp_path / "run" / folder).mkdir(parents=True)
        (tmp_path / "run" / folder / "config.json").write_text("{}")
        (tmp_path / "run" / folder / "model.safetensors").write_bytes(bytes(size))
    return tmp_path / "run"


def test_a_dry_run_says_what_would_be_uploaded(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["push", str(run), "me/model", "--dry-run"])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[:2] == [["2", "config.json"], ["5", "model.safetensors"]]
    assert lines[2] == ["7", "bytes", "would", "go", "from", str(run / "output"), "to", "me/model"]
    main(["push", str(run), "me/model", "--step", "50", "--dry-run"])
    assert "7  model.safetensors" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--step", "60"], "has no checkpoint of step 60; checkpoints: 50"),
        ([], "no token for the Hugging Face Hub was found; set HF_TOKEN, or run `hf auth login`"),
    ],
)
def test_what_cannot_be_pushed_is_refused(
    run: Path,
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(SystemExit) as left:
        main(["push", str(run), "me/model", *arguments])
    assert left.value.code == 2
    assert message in capsys.readouterr().err


def test_a_run_without_output_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    exchange_at(tmp_path / "run")
    with pytest.raises(SystemExit):
        main(["push", str(tmp_path / "run"), "me/model", "--dry-run"])
    assert "has no output yet" in capsys.readouterr().err
