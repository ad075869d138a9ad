"""The vLLM engine, in this process, on GPUs or on the CPU build; the same code serves both.

Weights are swapped by vLLM's `reload_weights`, which is silently wrong for tied embeddings: a tied model is therefore
served untied, from a folder of links with `tie_word_embeddings: false` and the head as a tensor of its own. Only paths
are handed to vLLM, so that its workers may be other processes. A swap happens between calls of `generate`, when no
request runs; the prefix cache is dropped after it, since old prefixes would poison everything that follows.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import torch

# Read when vLLM is imported. One process: the sampler owns the loop, and starts in a third of the time. Without a GPU
# torch's compiler would only gather log-probabilities, for seconds and with a C++ compiler at hand.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # its warnings are many, and the canary judges the result
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("TORCHDYNAMO_DISABLE", "0" if torch.cuda.is_available() else "1")

import numpy as np
from safetensors import safe_open
from safetensors.torch import save_file
from vllm import CompletionOutput, EngineArgs, LLMEngine, RequestOutput, SamplingParams
from vllm.config.lora import MaxLoRARanks
from vllm.inputs import tokens_input
from vllm.logprobs import Logprob
from vllm.lora.request import LoRARequest
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind

from heterorl.errors import CorruptFile, HeteroRLError, SiteError, UserError
from heterorl.exchange.canary import CANARY_TOKENS, require_same_tensors, tensor_shapes, weight_files
from heterorl.exchange.rollout import Completion, Sampling
from heterorl_sampler.decoding import StopTexts
from heterorl_sampler.engines.model_files import Dtype, context_length, end_token_ids, head_and_embedding


class VLLMEngine:
    """A vLLM model in this process (with its workers, when tensor parallel)."""

    def __init__(
        self,
        model_dir: Path,
        *,
        dtype: Dtype,
        max_model_len: int,
        gpus: int,
        tensor_parallel: int,
        gpu_memory_utilization: float,
        kv_cache_bytes: int,
        lora_rank: int = 0,
    ) -> None:
        """`lora_rank`: of the adapters that `load_weights` takes, beside the model's weights; 0: it takes weights."""
        _require_device(gpus)
        self._model_dir, self._ends = model_dir, end_token_ids(model_dir)
        self._head, self._embedding = head_and_embedding(model_dir)
        self._shapes = self._served_shapes(weight_files(model_dir))
        self._views = tempfile.TemporaryDirectory(prefix="heterorl-vllm-")
        self._view_numbers = itertools.count()
        # Eager and with a given cache size, vLLM skips its warm-up on a CPU. Prompts are read whole there: after a part
        # of one, vLLM winds a seeded request's generator back, which a generator on the CPU cannot do.
        on_cpu = {"enforce_eager": True, "kv_cache_memory_bytes": kv_cache_bytes, "enable_chunked_prefill": False}
        args = EngineArgs(
            str(self._make_view(model_dir)),
            skip_tokenizer_init=True,
            dtype=dtype,
            max_model_len=min(max(max_model_len, CANARY_TOKENS + 1), context_length(model_dir)),
            tensor_parallel_size=tensor_parallel,
            logprobs_mode="processed_logprobs",
            disable_log_stats=True,
            use_tqdm_on_load=False,
            enable_lora=lora_rank > 0,
            max_lora_rank=_lora_room(lora_rank),
            **({"gpu_memory_utilization": gpu_memory_utilization} if gpus else on_cpu),
        )
        try:
            self._engine = LLMEngine.from_engine_args(args)
        except ValueError as error:
            if "Free memory on device" in str(error):  # another process of this node holds it
                raise SiteError(f"vLLM does not start on this node: {' '.join(str(error).split())}") from error
            raise UserError(f"vLLM does not start on {model_dir}: {' '.join(str(error).split())}") from error
        self._request_numbers, self._adapter_numbers = itertools.count(), itertools.count(1)
        self._takes_adapters = lora_rank > 0
        self._adapter: LoRARequest | None = None

    def generate(
        self, prompts: list[list[int]], n: int, sampling: Sampling, seed: int, stop: Callable[[], bool] = lambda: False
    ) -> list[list[Completion] | None]:
        """`n` completions of each prompt, one request a completion: vLLM's own n is the same, but ends them together.

        Its stop texts would need its tokenizer and cut the text but not the tokens: `StopTexts` ends requests here.
        """
        stop_texts = StopTexts(sampling.stop, self._model_dir)
        seeds = np.random.SeedSequence(seed).generate_state(len(prompts) * n, np.uint64) >> np.uint64(2)
        params = [
            SamplingParams(
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                top_k=sampling.top_k,
                min_p=sampling.min_p,
                repetition_penalty=sampling.repetition_penalty,
                max_tokens=sampling.max_tokens,
                seed=int(own_seed),
                stop_token_ids=[*self._ends, *sampling.stop_token_ids],
                logprobs=0,  # the sampled token's alone
                detokenize=False,
                output_kind=RequestOutputKind.CUMULATIVE if sampling.stop else RequestOutputKind.FINAL_ONLY,
            )
            for own_seed in seeds
        ]
        requests = self._run([prompt for prompt in prompts for _ in range(n)], params, stop, stop_texts)
        made = [_completion(request.outputs[0], stop_texts) if request else None for request in requests]
        groups = [[c for c in made[start : start + n] if c] for start in range(0, len(made), n)]
        return [group if len(group) == n else None for group in groups]

    def score(self, token_ids: list[list[int]]) -> list[list[float]]:
        """Log-probabilities at temperature 1 of tokens 1 and later; vLLM's prompt log-probabilities know no other."""
        params = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
        scores = []
        for text, request in zip(token_ids, self._run(token_ids, [params] * len(token_ids))):
            assert request is not None
            assert request.prompt_logprobs is not None
            scores.append([_logp(entry, token) for token, entry in zip(text[1:], request.prompt_logprobs[1:])])
        return scores

    def _run(
        self,
        prompts: list[list[int]],
        params: list[SamplingParams],
        stop: Callable[[], bool] = lambda: False,
        stop_texts: StopTexts | None = None,
    ) -> list[RequestOutput | None]:
        """Finished requests in the order of the prompts; None for those that `stop` cut short."""
        names = [str(next(self._request_numbers)) for _ in prompts]
        for name, prompt, param in zip(names, prompts, params):
            self._engine.add_request(name, tokens_input(prompt), param, lora_request=self._adapter)
        finished: dict[str, RequestOutput] = {}
        while len(finished) < len(names) and not stop():
            outputs = [output for output in self._engine.step() if isinstance(output, RequestOutput)]
            said = stop_texts.said([output.outputs[0].token_ids for output in outputs]) if stop_texts else ()
            ended = [output.request_id for output, has_said in zip(outputs, said) if has_said and not output.finished]
            self._engine.abort_request(ended)
            finished |= {o.request_id: o for o in outputs if o.finished or o.request_id in ended}
        self._engine.abort_request([name for name in names if name not in finished])
        return [finished.get(name) for name in names]

    def load_weights(self, folder: Path) -> None:
        """Reload from the folder's files in place, or take its adapters, then drop the prefix cache."""
        if self._takes_adapters:
            self._load_adapter(folder)
        else:
            self._reload(folder)
        if not self._engine.reset_prefix_cache():
            raise HeteroRLError("vLLM kept its prefix cache after a swap, so a request was still running")

    def _load_adapter(self, folder: Path) -> None:
        """Compute with these adapters from now on, and forget those before."""
        number = next(self._adapter_numbers)
        adapter = LoRARequest(f"adapter-{number}", number, str(folder))
        try:
            self._engine.add_lora(adapter)
        except Exception as error:  # whatever its loader says of files that do not fit
            raise CorruptFile(f"{folder}: vLLM does not take these adapters: {' '.join(str(error).split())}") from error
        if self._adapter is not None:
            self._engine.remove_lora(self._adapter.lora_int_id)
        self._adapter = adapter

    def _reload(self, folder: Path) -> None:
        require_same_tensors(self._served_shapes(weight_files(folder)), self._shapes)
        view = self._make_view(folder)
        try:
            self._engine.collective_rpc("reload_weights", kwargs={"weights_path": str(view)})
        finally:
            shutil.rmtree(view)

    def _make_view(self, folder: Path) -> Path:
        """A local folder of links to the weights, with a head of its own and a config that says so."""
        view = Path(self._views.name) / str(next(self._view_numbers))
        view.mkdir()
        files = weight_files(folder)
        for path in files:
            (view / path.name).symlink_to(path.resolve())
        if self._is_tied(tensor_shapes(files)):
            with safe_open(_holder_of(self._embedding, files), "pt") as tensors:
                save_file({self._head: tensors.get_tensor(self._embedding)}, view / "head.safetensors")
        if (folder / "config.json").is_file():
            config = json.loads((folder / "config.json").read_text())
            (view / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
        return view

    def _served_shapes(self, files: list[Path]) -> dict[str, tuple[int, ...]]:
        """Shapes as they are served: a tied model's files have no head, its view has."""
        shapes = tensor_shapes(files)
        return shapes | {self._head: shapes[self._embedding]} if self._is_tied(shapes) else shapes

    def _is_tied(self, shapes: dict[str, tuple[int, ...]]) -> bool:
        return self._head not in shapes and self._embedding in shapes

    def close(self) -> None:
        """Stop vLLM and remove the serving folders."""
        self._engine.engine_core.shutdown()
        del self._engine
        self._views.cleanup()


def _require_device(gpus: int) -> None:
    if gpus and current_platform.is_cpu():
        raise UserError(f"gpus: {gpus}, but this vLLM is the CPU build; set gpus: 0 or install heterorl[sampler]")
    if gpus > torch.cuda.device_count():
        raise SiteError(f"gpus: {gpus}, but torch finds {torch.cuda.device_count()} on this node")
    if not gpus and not current_platform.is_cpu():
        raise UserError("gpus: 0, but this vLLM is not the CPU build; set gpus: 1 or install heterorl[sampler-cpu]")


def _lora_room(rank: int) -> MaxLoRARanks:
    """The smallest rank that vLLM has room for and that is at least this one."""
    ranks: tuple[MaxLoRARanks, ...] = get_args(MaxLoRARanks)
    return min(room for room in ranks if room >= rank)


def _holder_of(name: str, files: list[Path]) -> Path:
    return next(path for path in files if name in tensor_shapes([path]))


def _completion(output: CompletionOutput, stop_texts: StopTexts) -> Completion:
    assert output.logprobs is not None
    token_ids = list(output.token_ids)
    logp = [_logp(entry, token) for token, entry in zip(token_ids, output.logprobs)]
    at_limit = output.finish_reason == "length"
    return Completion(token_ids, logp, truncated=at_limit and not any(stop_texts.said([token_ids])))


def _logp(entry: dict[int, Logprob] | None, token: int) -> float:
    """The token's log-probability; only a prompt's first token has no entry."""
    assert entry is not None
    return entry[token].logprob
