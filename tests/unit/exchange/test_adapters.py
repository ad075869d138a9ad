"""LoRA adapters as files: W + alpha / r * B A by hand, its rounding, and what does not fit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from builders import CANARY, exchange_at
from heterorl.errors import CorruptFile
from heterorl.exchange.adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS, merge_into
from heterorl.exchange.exchange import Exchange
from heterorl.exchange.records import ModelOrigin
from heterorl.exchange.version import Version

A = torch.tensor([[1.0, -2.0, 0.5]])  # [r 1, in 3]
B = torch.tensor([[2.0], [1.0]])  # [out 2, r 1]
CONFIG = {"r": 1, "lora_alpha": 2, "fan_in_fan_out": False}
LAYER = "base_model.model.model.q_proj"


def write(folder: Path, down: Tensor = A, up: Tensor = B, layer: str = LAYER, **config: object) -> Path:
    """Adapters as peft writes them."""
    folder.mkdir(exist_ok=True)
    (folder / ADAPTER_CONFIG).write_text(json.dumps(CONFIG | config))
    save_file({f"{layer}.lora_A.weight": down, f"{layer}.lora_B.weight": up}, folder / ADAPTER_WEIGHTS)
    return folder


def merged(folder: Path, **base: Tensor) -> dict[str, Tensor]:
    merge_into(folder, {f"model.{name}.weight": tensor for name, tensor in base.items()})
    return load_file(folder / "model.safetensors")


def test_a_layer_becomes_w_plus_alpha_over_r_times_b_a_and_the_others_stay(tmp_path: Path) -> None:
    found = merged(write(tmp_path / "v"), q_proj=torch.ones(2, 3), norm=torch.ones(3))
    # B A = [[2, -4, 1], [1, -2, 0.5]], twice that, and 1.
    assert found["model.q_proj.weight"].tolist() == [[5.0, -7.0, 3.0], [3.0, -3.0, 2.0]]
    assert found["model.norm.weight"].tolist() == [1.0, 1.0, 1.0]
    assert [path.name for path in (tmp_path / "v").iterdir()] == ["model.safetensors"]


def test_a_layer_that_keeps_its_weight_as_in_by_out_gets_it_that_way(tmp_path: Path) -> None:
    found = merged(write(tmp_path / "v", fan_in_fan_out=True), q_proj=torch.zeros(3, 2))
    assert found["model.q_proj.weight"].tolist() == [[4.0, 2.0], [-8.0, -4.0], [2.0, 1.0]]


def test_in_bfloat16_the_sum_is_rounded_once(tmp_path: Path) -> None:
    # B A = 2^-8 + 2^-20. Between 1 and 2 bfloat16 has steps of 2^-7, so 1 + 2^-8 + 2^-20 rounds up to 1 + 2^-7. Were
    # B A rounded first, to 2^-8, the sum would be halfway and go down to the even neighbour, 1.
    down, up = torch.ones(2, 1).bfloat16(), torch.tensor([[2.0**-8, 2.0**-20]]).bfloat16()
    write(tmp_path / "v", down, up, r=2)
    found = merged(tmp_path / "v", q_proj=torch.ones(1, 1, dtype=torch.bfloat16))["model.q_proj.weight"]
    assert found.dtype == torch.bfloat16
    assert found.item() == 1 + 2.0**-7


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: write(folder, layer="base_model.model.model.other"), "does not fit the model"),
        (lambda folder: write(folder, down=torch.ones(1, 4)), r"it is \(2, 4\), the layer \(2, 3\)"),
        (lambda folder: write(folder, up=torch.ones(2, 2)), "does not fit the model"),
        (lambda folder: write(folder, up=torch.ones(1, 1)), r"it is \(1, 3\), the layer \(2, 3\)"),
        (lambda folder: (write(folder) / ADAPTER_CONFIG).write_text("{}"), "cannot be read"),
        (lambda folder: (write(folder) / ADAPTER_WEIGHTS).write_bytes(b"torn"), "cannot be read"),
        (lambda folder: (write(folder) / ADAPTER_WEIGHTS).unlink(), "cannot be read"),
    ],
)
def test_adapters_that_do_not_fit_or_cannot_be_read_are_corrupt(
    tmp_path: Path, change: Callable[[Path], object], message: str
) -> None:
    change(tmp_path / "v")
    with pytest.raises(CorruptFile, match=message):
        merged(tmp_path / "v", q_proj=torch.ones(2, 3))
    assert not (tmp_path / "v" / "model.safetensors").exists()


# ── on the volume ────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.fixture
def exchange(tmp_path: Path) -> Exchange:
    exchange = exchange_at(tmp_path / "run")
    exchange.mark_prepared(ModelOrigin(source="tiny", digest="0123"))
    write(exchange.stage_weights(Version(3, 1)))
    exchange.commit_weights(Version(3, 1), CANARY)
    return exchange


def test_a_version_of_adapters_says_so_and_which_model_they_belong_to(exchange: Exchange, tmp_path: Path) -> None:
    manifest = json.loads((exchange.root / "weights" / str(Version(3, 1)) / "manifest.json").read_text())
    assert (manifest["kind"], manifest["model"]) == ("adapter", "0123")
    assert set(manifest["files"]) == {ADAPTER_CONFIG, ADAPTER_WEIGHTS, "canary.json"}
    fetched = exchange.fetch_weights(Version(3, 1), tmp_path / "here")
    assert torch.equal(load_file(fetched.folder / ADAPTER_WEIGHTS)[f"{LAYER}.lora_B.weight"], B)
    assert fetched.canary == CANARY


def test_adapters_are_refused_where_the_starting_model_is_another(exchange: Exchange, tmp_path: Path) -> None:
    exchange.mark_prepared(ModelOrigin(source="tiny", digest="4567"))
    with pytest.raises(CorruptFile, match="belong to the model with digest 0123; the starting model here has 4567"):
        exchange.fetch_weights(Version(3, 1), tmp_path / "here")


def test_a_version_that_lacks_a_file_of_its_kind_is_corrupt(exchange: Exchange, tmp_path: Path) -> None:
    path = exchange.root / "weights" / str(Version(3, 1)) / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["files"][ADAPTER_CONFIG]
    path.write_text(json.dumps(manifest))
    with pytest.raises(CorruptFile, match=f"does not list {ADAPTER_CONFIG}"):
        exchange.fetch_weights(Version(3, 1), tmp_path / "here")
