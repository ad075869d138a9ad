"""A sampler's first token, in a process of its own: python -m bench.first_token ours|theirs MODEL_FOLDER"""

from __future__ import annotations

import sys
from pathlib import Path

PROMPT = [5, 6, 7, 8]
CONTEXT = 1024


def ours(model: Path) -> int:
    """As a sampler's pod starts its engine."""
    from heterorl.exchange.rollout import Sampling
    from heterorl_sampler.engines.build import build_engine

    engine = build_engine("vllm", model, dtype="float32", max_model_len=CONTEXT)
    (group,) = engine.generate([PROMPT], 1, Sampling(temperature=0.0, max_tokens=1), seed=0)
    assert group is not None
    return group[0].token_ids[0]


def theirs(model: Path) -> int:
    """As vLLM starts when it is told the model, and nothing else but the number format."""
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt

    engine = LLM(str(model), dtype="float32", max_model_len=CONTEXT)
    (request,) = engine.generate([TokensPrompt(prompt_token_ids=PROMPT)], SamplingParams(temperature=0.0, max_tokens=1))
    return int(request.outputs[0].token_ids[0])


if __name__ == "__main__":
    token = {"ours": ours, "theirs": theirs}[sys.argv[1]](Path(sys.argv[2]))
    print(f"token {token}", flush=True)
