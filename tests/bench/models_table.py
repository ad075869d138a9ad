"""The tables of docs/models.md: what the learner and the engines make of every small causal architecture.

    python -m bench.models_table table|vllm|forms [NAME ...]

`table`: the learner and the transformers engine on all of transformers' mapping. `vllm`: the last column, of those that
the learner trains. `forms`: the second table, of heads, files and data types. Each row is recorded as soon as it is
known, so that a run that was interrupted goes on with the names that are left.
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
from typing import Any, get_args

from bench.page import ROOT, put, rows_in, table_line

DOCS = ROOT / "docs" / "models.md"
TABLE, FORMS_TABLE = "architectures", "forms"
"""Sections of the page, each with a table."""
VLLM_SECONDS, CELL = 240, "cell: "
FORMS: dict[str, dict[str, Any]] = {
    "tied head": {"tie_word_embeddings": True},
    "untied head": {"tie_word_embeddings": False},
    "sharded files": {"shards": "100KB"},
    "bfloat16": {},
}
"""Of a model's folder, or of its data type; the second table tries them on `OF_FORMS`, with vLLM on `OF_VLLM_FORMS`."""
OF_FORMS = ("llama", "qwen3", "gemma2", "gpt2", "opt", "falcon", "qwen3_moe", "qwen3_5", "jamba", "mamba")
OF_VLLM_FORMS = ("llama", "qwen3", "gemma2", "gpt2", "opt")


def row(name: str, vllm: str) -> list[str]:
    """A line of the first table, with the last cell given."""
    import architectures

    if name in architectures.CANNOT:
        return [name, f"not tried: {architectures.CANNOT[name]}", "", "", ""]
    with tempfile.TemporaryDirectory() as scratch:
        try:
            folder = architectures.save(name, Path(scratch) / "model")
        except Exception as error:
            return [name, f"cannot be built small: {_first_line(error)}", "", "", ""]
        return [name, *learner(folder), sampler(folder, "transformers"), vllm]


def form(name: str, kind: str, which: str) -> str:
    """A cell of the second table: the learner's layout, and how the engine serves what it publishes."""
    import architectures
    from builders import spec_of
    from heterorl_learner.engines.build import build_engine as build_learner

    dtype = "bfloat16" if which == "bfloat16" else "float32"
    with tempfile.TemporaryDirectory() as scratch:
        try:
            folder = architectures.save(name, Path(scratch) / "model", **FORMS[which])
            layout = build_learner(folder, spec_of(model={"dtype": dtype})).layout
        except Exception as error:
            return f"refused: {_first_line(error)}"
        return f"{layout}; {sampler(folder, kind, dtype)}"


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


def sampler(folder: Path, kind: str, dtype: str = "float32") -> str:
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
        texts = [torch.randint(3, 128, (272,), generator=torch.Generator().manual_seed(i)).tolist() for i in (0, 1)]
        spec = spec_of(model={"dtype": dtype})
        publisher = build_learner(folder, spec)
        with torch.no_grad():
            for p in publisher._bare.parameters():
                p.mul_(1.01)  # other weights than the engine started with
        ids = [np.array(text) for text in texts]
        batches = [micro_batch([Sequence(i[:1], i[1:], np.zeros(len(i) - 1, np.float32), 0, 0.0)]) for i in ids]
        canary = Canary(texts, [publisher.score(batch).tolist() for batch in batches])
        # Only now: for some models vLLM changes what transformers computes with.
        engine = build_engine(kind, folder, dtype=dtype, max_model_len=300)  # type: ignore[arg-type]
        with tempfile.TemporaryDirectory() as published:
            save_file(publisher.full_state_dict(), Path(published) / "model.safetensors", metadata={"format": "pt"})
            engine.load_weights(Path(published))
        difference = canary.check(Version(1, 1), engine.score, spec.canary_tolerance)
    except Exception as error:
        return f"refused: {_first_line(error)}"
    return f"{getattr(engine, 'reading', 'serves')}, canary {difference:.1g}"


def _first_line(error: Exception) -> str:
    text = " ".join((str(error).strip() or type(error).__name__).split()).replace("|", "/")
    text = re.sub(rf"{tempfile.gettempdir()}/\S+/model", "the model", text)
    return text if len(text) < 200 else text[:200] + "…"


def in_a_process(name: str, kind: str, which: str = "") -> str:
    """A cell found by a process of its own, since vLLM's engines want one each."""
    command = [sys.executable, "-m", "bench.models_table", "cell", name, kind, which]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=VLLM_SECONDS, env=environment)
    except subprocess.TimeoutExpired:
        return f"not in {VLLM_SECONDS} s"
    found = [said for said in result.stdout.splitlines() if said.startswith(CELL)]
    return found[-1].removeprefix(CELL) if found else f"its process ended with {result.returncode}"


def cell(name: str, kind: str, which: str) -> str:
    """A cell of vLLM's column, or with `which` of the second table."""
    import architectures

    if which:
        return form(name, kind, which)
    with tempfile.TemporaryDirectory() as scratch:
        return sampler(architectures.save(name, Path(scratch) / "model"), kind)


def committed(section: str = TABLE, key: int = 1) -> dict[str, list[str]]:
    """The rows of a table in docs/models.md by their first cells, as many as `key`, put together."""
    return {" ".join(found[:key]): found for found in rows_in(DOCS, section)[1:]}


def record(section: str, row: list[str], key: int = 1) -> None:
    """Put a row into the page, in place of the one with the same first cells or at the end."""
    head = rows_in(DOCS, section)[0]
    rows = committed(section, key) | {" ".join(row[:key]): row}
    put(DOCS, section, "\n".join(map(table_line, [head, ["---"] * len(head), *rows.values()])))
    print(*row, sep=" | ", flush=True)


def main() -> int:
    logging.disable(logging.WARNING)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=("table", "vllm", "forms", "cell"))
    parser.add_argument("names", nargs="*")
    args = parser.parse_args()
    if args.part == "cell":
        print("\n" + CELL + cell(*args.names))
    elif args.part == "table":
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as MAPPING

        for name in args.names or MAPPING:
            record(TABLE, row(name, committed().get(name, [""])[-1]))
    elif args.part == "vllm":
        from heterorl_learner.engines.policy import Layout

        trained = [name for name, found in committed().items() if found[1] in get_args(Layout)]
        for name in args.names or trained:
            record(TABLE, [*committed()[name][:-1], in_a_process(name, "vllm")])
    else:
        for name in args.names or OF_FORMS:
            record(FORMS_TABLE, [name, "transformers", *(form(name, "transformers", which) for which in FORMS)], key=2)
            if name in OF_VLLM_FORMS:
                record(FORMS_TABLE, [name, "vllm", *(in_a_process(name, "vllm", which) for which in FORMS)], key=2)
    return 0


if __name__ == "__main__":
    sys.exit(main())
