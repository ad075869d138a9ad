"""The table of docs/models.md: what the learner and the engines make of every small causal architecture.

    python -m bench.models_table [--vllm] [NAME ...]

Without names it takes all of transformers' mapping and rewrites the table, keeping what it says of vLLM unless that is
tried, too; with names it prints their rows. vLLM starts one engine a process.
"""

from __future__ import annotations

import argparse
import logging
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs" / "models.md"
BEGIN, END = "<!-- made by make models-table -->\n", "<!-- end of the table -->\n"
HEADER = "| architecture | learner | gradients at budgets 1, 40, 100,000 | transformers sampler | vLLM |\n|---|---|---|---|---|\n"
VLLM_SECONDS = 240
VLLM = (
    *(
        "llama",
        "mistral",
        "qwen2",
        "qwen3",
        "gemma2",
        "gemma3_text",
        "phi",
        "phi3",
        "gpt2",
        "gpt_neox",
        "opt",
        "falcon",
    ),
    *("bloom", "granite", "olmo2", "qwen3_moe", "mixtral", "qwen3_next", "qwen3_5", "jamba", "bamba", "mamba", "lfm2"),
    *("granitemoehybrid", "smollm3", "starcoder2", "stablelm", "glm4", "exaone4", "llama4_text"),
)
"""Those that vLLM is tried on; the others' cells are empty."""


def row(name: str, *, vllm: bool) -> str:
    """A line of the table."""
    import architectures

    if name in architectures.CANNOT:
        return f"| {name} | not tried: {architectures.CANNOT[name]} | | | |"
    with tempfile.TemporaryDirectory() as scratch:
        try:
            folder = architectures.save(name, Path(scratch) / "model")
        except Exception as error:
            return f"| {name} | cannot be built small: {_first_line(error)} | | | |"
        cells = [*learner(folder), sampler(folder, "transformers")]
        cells.append(sampler(folder, "vllm") if vllm and "refused" not in cells[0] else "")
    return f"| {name} | " + " | ".join(cells) + " |"


def learner(folder: Path) -> tuple[str, str]:
    """The layout, and the least cosine of a step's gradients at three token budgets."""
    import torch

    from heterorl.errors import ModelError
    from process.test_packing import step_of

    try:
        expected, gradient, engine = step_of(folder, 1)
        worst = 1.0
        for token_budget in (40, 100_000):
            loss, found, _ = step_of(folder, token_budget)
            if abs(loss - expected) > 1e-4 * abs(expected) + 1e-7:
                return engine.layout, f"losses {expected:.7g} and {loss:.7g}"
            worst = min(worst, torch.cosine_similarity(found.double(), gradient.double(), dim=0).item())
    except ModelError as error:
        return f"refused: {_first_line(error)}", ""
    except Exception as error:
        return f"fails: {_first_line(error)}", ""
    return engine.layout, f"{worst:.6f}"


def sampler(folder: Path, kind: str) -> str:
    """How the engine generates, or why it does not: canary as after a publication by the learner."""
    import numpy as np
    import torch
    from safetensors.torch import save_file

    from builders import spec_of
    from heterorl.exchange.canary import Canary
    from heterorl.exchange.version import Version
    from heterorl_learner.engines.build import build_engine as build_learner
    from heterorl_learner.engines.torch_ddp import Sequence, micro_batch
    from heterorl_sampler.engines.build import build_engine

    try:
        engine = build_engine(kind, folder, dtype="float32", max_model_len=300)  # type: ignore[arg-type]
        texts = [torch.randint(3, 128, (272,), generator=torch.Generator().manual_seed(i)).tolist() for i in (0, 1)]
        publisher = build_learner(folder, spec_of(model={"dtype": "float32"}))
        with torch.no_grad():
            for p in publisher._bare.parameters():
                p.mul_(1.01)  # other weights than the engine started with
        ids = [np.array(text) for text in texts]
        batches = [micro_batch([Sequence(i[:1], i[1:], np.zeros(len(i) - 1, np.float32), 0, 0.0)]) for i in ids]
        canary = Canary(texts, [publisher.score(batch).tolist() for batch in batches])
        with tempfile.TemporaryDirectory() as published:
            save_file(publisher.full_state_dict(), Path(published) / "model.safetensors", metadata={"format": "pt"})
            engine.load_weights(Path(published))
        difference = canary.check(Version(1, 1), engine.score, 1e-4)
    except Exception as error:
        return f"refused: {_first_line(error)}"
    return f"{getattr(engine, 'reading', 'serves')}, canary {difference:.1g}"


def _first_line(error: Exception) -> str:
    text = " ".join((str(error).strip() or type(error).__name__).split()).replace("|", "/")
    text = re.sub(rf"{tempfile.gettempdir()}/\S+/model", "the model", text)
    return text if len(text) < 200 else text[:200] + "…"


def vllm_cell(name: str) -> str:
    """The last cell, found by a process of its own."""
    command = [sys.executable, "-m", "bench.models_table", "--vllm", name]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=VLLM_SECONDS, env=environment)
    except subprocess.TimeoutExpired:
        return f"not in {VLLM_SECONDS} s"
    rows = [line for line in result.stdout.splitlines() if line.startswith(f"| {name} |")]
    return cells(rows[-1])[-1] if rows else f"its process ended with {result.returncode}"


def cells(line: str) -> list[str]:
    """A row of the table, taken apart."""
    return [cell.strip() for cell in line.strip().removeprefix("|").removesuffix("|").split("|")]


def committed() -> dict[str, list[str]]:
    """The rows in docs/models.md by architecture."""
    table = DOCS.read_text().partition(BEGIN)[2].partition(END)[0].splitlines()[2:]
    return {found[0]: found for found in map(cells, table)}


def write(rows: list[str]) -> None:
    """Put the table into the page."""
    before, _, rest = DOCS.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    DOCS.write_text(before + BEGIN + HEADER + "\n".join(rows) + "\n" + END + after)


def main() -> int:
    logging.disable(logging.WARNING)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vllm", action="store_true", help="with an engine of vLLM, which takes half a minute a row")
    parser.add_argument("names", nargs="*")
    args = parser.parse_args()
    if args.names:
        for name in args.names:
            print(row(name, vllm=args.vllm), flush=True)
        return 0
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as MAPPING

    old, rows = committed(), []
    for name in MAPPING:
        found = cells(row(name, vllm=False))
        print(*found, sep=" | ", flush=True)
        if found[1] in ("packed", "padded", "alone") and name in VLLM:
            found[-1] = vllm_cell(name) if args.vllm else old.get(name, [""])[-1]
        rows.append("| " + " | ".join(found) + " |")
    write(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
