"""Puts the starting model and the tokenised data onto the volume, once, before all other processes start.

Order: tokenizer, data, model, marker. What a user may have got wrong is found before the costly part, and nothing is
seen half-written: files and the model folder appear by rename, the marker comes last. A second call does nothing; one
after a crash starts over.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (  # type: ignore[attr-defined]  # HTTPError is the base class of its HTTP client
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, PreTrainedTokenizerBase

from heterorl.data.datasets import PreparedData, prepare_rows, prepare_training
from heterorl.data.prompts import Template
from heterorl.data.tokenizer import load_tokenizer
from heterorl.errors import ModelError, UserError
from heterorl.exchange.adapters import ADAPTER_CONFIG
from heterorl.exchange.exchange import Exchange
from heterorl.exchange.published_folder import replaced
from heterorl.exchange.records import DataCount, ModelOrigin, Prepared
from heterorl.exchange.storage import Files, persistently
from heterorl.spec.run import ModelSpec, RunSpec
from heterorl_learner.engines.torch_ddp import save_tensors
from heterorl_learner.tiny import MAX_POSITIONS, build_model, build_tokenizer, examples_from, supervise

logger = logging.getLogger(__name__)

MODEL_FILES = ("*.json", "*.jinja", "*.txt", "*.model", "model*.safetensors")
"""What is taken from a model folder or repository: configuration, tokenizer, weights; no code and no pickles."""


def prepare(exchange: Exchange) -> Prepared:
    """Prepare the run unless it is prepared; returns what the marker says.

    Raises ModelError and DataError for what the user has to correct.
    """
    if (done := exchange.prepared) is not None:
        return done
    try:
        return _fill(exchange)
    except BaseException:
        exchange.release()
        raise


@dataclass(frozen=True)
class Inputs:
    """What a run starts from."""

    folder: Path | None
    """The complete Hugging Face folder of the model; None for a tiny one."""
    tokenizer: PreTrainedTokenizerBase
    tables: dict[str, PreparedData]
    """The tokenised datasets by the names of their files."""


def read_inputs(spec: RunSpec, base: Path) -> Inputs:
    """Read and check all that a user brings; relative paths start at `base`. Raises ModelError and DataError."""
    folder = find_model(spec.model)
    tokenizer = load_tokenizer(folder) if folder else build_tokenizer()
    _require_positions(spec, folder)
    _require_tokens(spec, tokenizer)
    return Inputs(folder, tokenizer, dict(_tokenise(spec, tokenizer, base)))


def write_tables(exchange: Exchange, tables: dict[str, PreparedData]) -> dict[str, DataCount]:
    """Put the tokenised datasets onto the volume."""
    exchange.files.make_dir(exchange.data_file("train").parent)
    return {name: _write_table(exchange, name, table) for name, table in tables.items()}


def _fill(exchange: Exchange) -> Prepared:
    spec, told = exchange.spec, exchange.spec.model.path
    inputs = persistently(
        lambda: read_inputs(spec, exchange.root), what="model and data", folder=Path(told) if told else None
    )
    for name, table in inputs.tables.items():
        logger.info("%s: %d problems, %d skipped for their length", name, len(table.rows), table.skipped)
        for reason, count in table.bad.items():
            logger.warning("%s: %d rows left out: %s", name, count, reason)
    counts = write_tables(exchange, inputs.tables)
    with replaced(exchange.files, exchange.model_dir) as staged:
        if inputs.folder:
            _copy(inputs.folder, staged, exchange.files)
            made: dict[str, Any] = {}
        else:
            made = _make_tiny(exchange.spec, inputs.tokenizer, inputs.tables["train"].rows, staged)
        origin = ModelOrigin(source=str(inputs.folder or "tiny"), digest=_digest(staged, exchange.files), **made)
    return exchange.mark_prepared(origin, counts)


# ── data ─────────────────────────────────────────────────────────────────────────────────────────────────────────────
def _tokenise(spec: RunSpec, tokenizer: PreTrainedTokenizerBase, base: Path) -> Iterator[tuple[str, PreparedData]]:
    """Every dataset under its file's name. Where answers are compared, every reference answer must be comparable."""
    compares = any(reward.name in ("accuracy", "cosine", "length") for reward in spec.rewards)
    around = (base, tokenizer, Template.of(spec.data), spec.generation.max_prompt_tokens)
    yield "train", prepare_training(spec.data.train, *around, need_gold_parse=compares, seed=spec.seed)
    for dataset in spec.data.evals:
        compared = dataset.source != "reasoningGym"  # whose own verifiers tell right from wrong
        yield f"eval-{dataset.label}", prepare_rows(dataset, *around, need_gold_parse=compared, seed=spec.seed)


def _write_table(exchange: Exchange, name: str, table: PreparedData) -> DataCount:
    data = "".join(json.dumps(row) + "\n" for row in table.rows).encode()
    exchange.files.replace(exchange.data_file(name), data)
    digest = hashlib.sha256(data).hexdigest()
    return DataCount(rows=len(table.rows), skipped=table.skipped, bad=table.bad, digest=digest)


# ── model ────────────────────────────────────────────────────────────────────────────────────────────────────────────
def find_model(model: ModelSpec) -> Path | None:
    """The complete Hugging Face folder to start from, downloaded if need be; None for a tiny model."""
    if model.source == "tiny":
        return None
    folder = _inner_model(Path(model.path)) if model.path and model.source == "path" else _download(model)
    _require_complete(folder)
    return folder


def _inner_model(folder: Path) -> Path:
    """The model inside an output folder, a checkpoint or a whole run's folder (there its output)."""
    if not folder.is_dir():
        raise ModelError(f"model.path {folder} is not a folder; set it to the folder of a Hugging Face model")
    inner = ("output",) if (folder / "run.json").is_file() else ("", "model")
    for candidate in (folder / name for name in inner):
        if (candidate / "config.json").is_file():
            return candidate
        if (candidate / ADAPTER_CONFIG).is_file():
            raise ModelError(
                f"model.path {candidate} holds LoRA adapters, not a model; set it to the output/ of a run with"
                " model.lora.output: merged, or merge them with peft's merge_and_unload() and save_pretrained()"
            )
    raise ModelError(
        f"model.path {folder} has no config.json; expected a Hugging Face folder with config.json, model.safetensors"
        " and tokenizer.json, or a run's output/ or checkpoints/step-N"
    )


def _download(model: ModelSpec) -> Path:
    """The folder of the Hub's model in the local cache, which is filled over the network where it has to be."""
    where = f"model {model.name}" + (f" at revision {model.revision}" if model.revision else "")
    try:
        return Path(snapshot_download(str(model.name), revision=model.revision, allow_patterns=list(MODEL_FILES)))
    except HFValidationError as error:
        raise ModelError(f"{where}: {_first_line(error)}; set a name such as Qwen/Qwen3-1.7B") from error
    except RevisionNotFoundError as error:
        raise ModelError(f"{where}: the Hub has no such revision; set a branch, tag or commit of it") from error
    except RepositoryNotFoundError as error:
        raise ModelError(
            f"{where}: not found on the Hub, or no access; check the name, and set HF_TOKEN if it is private or gated"
        ) from error
    except (LocalEntryNotFoundError, HTTPError) as error:
        raise ModelError(
            f"{where}: the Hugging Face Hub cannot be reached and the local cache does not hold it; fill the cache"
            f" where there is a network (`hf download {model.name}`), or set source: path and the folder of a copy"
        ) from error


def _require_complete(folder: Path) -> None:
    """ModelError, naming it, for the first thing that a folder lacks or that cannot be read."""
    try:
        AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{folder}: config.json cannot be read: {_first_line(error)}") from error
    index = folder / "model.safetensors.index.json"
    names = (
        sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.is_file() else ["model.safetensors"]
    )
    for name in names:
        if not (folder / name).is_file():
            raise ModelError(
                f"{folder} has no {name}; only weights in safetensors are read: load the model with transformers and"
                " save_pretrained() it once"
            )
        try:
            with safe_open(folder / name, "pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{folder}: {name} cannot be read ({_first_line(error)}); copy it again") from error


def _require_positions(spec: RunSpec, folder: Path | None) -> None:
    """ModelError when prompt and completion may grow longer than the model can read."""
    config = AutoConfig.from_pretrained(folder) if folder else None
    positions = getattr(config, "max_position_embeddings", None) if config else MAX_POSITIONS
    wanted = spec.generation.max_prompt_tokens + spec.generation.max_completion_tokens
    if positions is not None and wanted > positions:
        raise ModelError(
            f"generation.maxPromptTokens + maxCompletionTokens is {wanted}, but the model reads {positions} tokens;"
            " lower one of them"
        )


def _require_tokens(spec: RunSpec, tokenizer: PreTrainedTokenizerBase) -> None:
    """UserError for a stop token that the model cannot generate."""
    if unknown := [token for token in spec.generation.stop_token_ids if token >= len(tokenizer)]:
        raise UserError(
            f"generation.stopTokenIds: the model has no token {unknown[0]}; its tokens are 0 to {len(tokenizer) - 1}"
        )


def _make_tiny(
    spec: RunSpec, tokenizer: PreTrainedTokenizerBase, rows: list[dict[str, Any]], staged: Path
) -> dict[str, Any]:
    torch.set_num_threads(1)  # the same sums in the same order on every machine
    tiny = spec.model.tiny.model_copy(update={"seed": spec.model.tiny.seed + spec.seed})
    model = build_model(tiny, tokenizer)
    outcome = supervise(model, examples_from(rows, tokenizer, boxed=spec.data.prompt_template != "raw"), tiny)
    # Not by model.save_pretrained, which imports DeepSpeed where it is installed: seconds, and an irrelevant message.
    tensors = {name: t for name, t in model.state_dict().items() if name not in model.all_tied_weights_keys}
    save_tensors(tensors, staged / "model.safetensors")
    model.config.architectures, model.config.dtype = [type(model).__name__], model.dtype
    for part in (model.config, model.generation_config, tokenizer):
        persistently(partial(part.save_pretrained, staged), what="the model")
    return {"supervised_steps": outcome.steps, "held_out_accuracy": outcome.accuracy}


def _copy(folder: Path, staged: Path, files: Files) -> None:
    for path in sorted({path for pattern in MODEL_FILES for path in folder.glob(pattern)}):
        files.copy(path, staged / path.name)


def _digest(folder: Path, files: Files) -> str:
    """SHA-256 over names and contents of a flat folder."""
    listing = "".join(f"{files.digest(path)}  {path.name}\n" for path in files.walk(folder))
    return hashlib.sha256(listing.encode()).hexdigest()


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).strip().splitlines()[0]
