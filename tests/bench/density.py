"""How many bfloat16 weights a run changes over 1 to 64 steps of Adam, and what deltas of them take.

    python -m bench.density MODEL TEXTS [--rate 1e-6]      (PYTHONPATH=tests:images/common:images/learner)

Trains the model of a Hugging Face folder on the lines of a text file, with float32 master weights, once with a random
advantage for each line, the noise that a policy gradient mostly is, and once supervised, all gradients alike.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from heterorl.exchange import delta

if TYPE_CHECKING:
    from torch import Tensor

LAGS = (1, 2, 4, 8, 16, 32, 64)
TEXTS_A_STEP = 8


def train(
    model: Any, texts: Sequence[Sequence[int]], steps: int, *, rate: float = 1e-6, supervised: bool = False
) -> Iterator[dict[str, Tensor]]:
    """The model's bfloat16 tensors before the first step and after each, tied ones once."""
    import torch

    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.999), weight_decay=0.0)
    draw = np.random.default_rng(0)
    for step in range(steps + 1):
        yield {name: parameter.detach().to(torch.bfloat16) for name, parameter in model.named_parameters()}
        if step == steps:
            return
        advantages = np.ones(TEXTS_A_STEP) if supervised else draw.standard_normal(TEXTS_A_STEP)
        for number, advantage in zip(draw.integers(0, len(texts), TEXTS_A_STEP), advantages):
            ids = torch.tensor([texts[number]])
            (float(advantage) * model(input_ids=ids, labels=ids, use_cache=False).loss).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def changes(before: Path, after: Path, scratch: Path) -> tuple[float, float]:
    """Between two files of bfloat16: the share of values that differ, and the delta's bytes as a share of the file's."""
    old, new = (np.fromfile(path, np.uint16) for path in (before, after))
    delta.encode(before, after, scratch, word=2, limit=2 * after.stat().st_size)
    return float(np.mean(old != new)), scratch.stat().st_size / after.stat().st_size


def main() -> None:
    """The command line: a table for each kind of training."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("texts", type=Path)
    parser.add_argument("--rate", type=float, default=1e-6)
    parser.add_argument("--tokens", type=int, default=64, help="of a text at most")
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    lines = [line for line in args.texts.read_text().splitlines() if line.strip()]
    texts = [ids for line in lines[:1000] if len(ids := tokenizer(line).input_ids[: args.tokens]) > 1]
    for supervised in (False, True):
        with tempfile.TemporaryDirectory(prefix="heterorl-density-") as folder:
            model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
            files: list[Path] = []
            for tensors in train(model, texts, max(LAGS), rate=args.rate, supervised=supervised):
                files.append(Path(folder) / f"{len(files)}.safetensors")
                save_file(tensors, files[-1])
                if len(files) - 1 not in {0, *(max(LAGS) - lag for lag in LAGS), max(LAGS), *LAGS}:
                    files[-1].unlink()
            print("supervised" if supervised else "random advantages")
            for lag in LAGS:
                share, size = changes(files[max(LAGS) - lag], files[-1], Path(folder) / "delta")
                print(
                    f"  last {lag:2} steps: {share:7.2%} of the values, delta 1/{1 / size:.1f} of the whole", flush=True
                )
            share, size = changes(files[0], files[1], Path(folder) / "delta")
            print(f"  first step:    {share:7.2%} of the values, delta 1/{1 / size:.1f} of the whole", flush=True)


if __name__ == "__main__":
    main()
