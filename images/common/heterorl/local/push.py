"""`heterorl push`: a run's model to the Hugging Face Hub."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from heterorl.errors import UserError
from heterorl.exchange.adapters import ADAPTER_CONFIG
from heterorl.exchange.exchange import Exchange


@dataclass(frozen=True)
class Upload:
    """A folder with a model or its adapters, and what goes to the Hub of it."""

    folder: Path
    files: list[tuple[str, int]]
    """Path below the folder and bytes, in order."""


def upload_of(run: Path, step: int | None = None) -> Upload:
    """The output of a run's folder, or the model of the checkpoint of that step; UserError if it is not there."""
    exchange = Exchange(run)
    folder = exchange.output_dir if step is None else run / "checkpoints" / f"step-{step:08d}" / "model"
    if not any((folder / name).is_file() for name in ("config.json", ADAPTER_CONFIG)):
        saved = ", ".join(map(str, exchange.list_checkpoints())) or "none"
        wanted = "has no output yet" if step is None else f"has no checkpoint of step {step}"
        raise UserError(f"{run} {wanted}; checkpoints: {saved} (--step N pushes one)")
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return Upload(folder, [(str(path.relative_to(folder)), path.stat().st_size) for path in paths])


def push(upload: Upload, repo: str, *, private: bool) -> str:
    """Create the repository unless it exists, and upload; returns its address. UserError without package or token."""
    try:
        from huggingface_hub import HfApi, get_token
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError
    except ImportError as error:
        raise UserError(f"pushing needs the package huggingface_hub ({error}); pip install it") from error
    if get_token() is None:
        raise UserError("no token for the Hugging Face Hub was found; set HF_TOKEN, or run `hf auth login`")
    api = HfApi()
    try:
        url = api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=upload.folder)
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise UserError(f"{repo}: the Hub did not take it: {str(error).splitlines()[0]}") from error
    return str(url)
