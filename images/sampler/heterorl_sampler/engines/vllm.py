"""The vLLM engine, in this process, on GPUs or on the CPU build; the same code serves both.

Weights are swapped by vLLM's `reload_weights`, which is silently wrong for tied embeddings: a tied model is therefore
served untied, from a folder of links with `tie_word_embeddings: false` and the head as a tensor of its own. Only paths
are handed to vLLM, so that its workers may be other processes.

A swap happens between two steps, in the midst of requests. What they have cached is of the old weights, and would
poison whatever follows: so all are put back to the waiting ones, the cache is dropped, and each text is read anew by
the new weights before its next token. Nothing of it is lost: tokens stay, and so does the state of a request's draws.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_args

import torch

# Read when vLLM is imported. One process: the sampler owns the loop, and starts in a third of the time. Without a GPU
# torch's compiler would only gather log-probabilities, for seconds and with a C++ compiler at hand.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # its warnings are many, and the canary judges the result
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("TORCHDYNAMO_DISABLE", "0" if torch.cuda.is_available() else "1")

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
from heterorl.exchange.canary import CANARY_TOKENS, tensor_shapes, weight_files
from heterorl.exchange.rollout import Completion, Sampling, runs_of
from heterorl.exchange.version import Version
from heterorl_sampler.engines.base import UNNAMED, Finished, InferenceEngine
from heterorl_sampler.engines.model_files import Dtype, context_length, end_token_ids
from heterorl_sampler.engines.model_tensors import ModelTensors
from heterorl_sampler.engines.stop_texts import StopTexts, stop_texts

MAX_RUNNING = 256
"""Completions at a time: what a device of the usual size has room for, and vLLM's own bound there."""
_TO_THE_END = sys.maxsize
"""Tokens that a completion has at a swap which is finished, but not yet handed out with its group."""


@dataclass
class _Group:
    """A group in generation."""

    stop_texts: StopTexts
    names: list[str]
    """Of its requests."""
    swaps: list[list[tuple[Version, int]]]
    """[n] of each completion: the version that was served until a swap, and its tokens by then."""
    made: dict[int, Completion] = field(default_factory=dict)


class VLLMEngine(InferenceEngine):
    """A vLLM model in this process (with its workers, when tensor parallel)."""

    def __init__(
        self,
        model_dir: Path,
        *,
        dtype: Dtype,
        max_model_len: int,
        max_running: int | None = None,
        gpus: int,
        tensor_parallel: int,
        gpu_memory_utilization: float,
        kv_cache_bytes: int,
        lora_rank: int = 0,
    ) -> None:
        """`lora_rank`: of the adapters that `load_weights` takes, beside the model's weights; 0: it takes weights."""
        _require_device(gpus)
        self._model_dir, self._ends = model_dir, end_token_ids(model_dir)
        self._tensors, self._unties = ModelTensors(model_dir), True
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
            max_num_seqs=max_running and min(max_running, MAX_RUNNING),
            tensor_parallel_size=tensor_parallel,
            async_scheduling=False,  # a step's tokens are out before the next: at a swap none are under way
            logprobs_mode="processed_logprobs",
            disable_log_stats=True,
            use_tqdm_on_load=False,
            enable_lora=lora_rank > 0,
            max_lora_rank=_lora_room(lora_rank),
            # With the head among them, vLLM's CPU build cannot score several texts at once.
            lora_target_modules=self._tensors.adaptable if lora_rank else None,
            **({"gpu_memory_utilization": gpu_memory_utilization} if gpus else on_cpu),
        )
        with _in_words(f"vLLM does not start on {model_dir}"):
            recurrent = not gpus and args.create_model_config().has_inner_state
            if recurrent:  # vLLM caches states only of prompts that it reads in parts
                args.enable_prefix_caching = False
            self._engine = self._start(args, model_dir)
        self._numbers = itertools.count()
        self._groups: dict[int, _Group] = {}
        self._finished: Finished = []
        self._adapter_numbers = itertools.count(1)
        self._takes_adapters = lora_rank > 0
        self._adapter: LoRARequest | None = None
        self.keeps_running = not self._takes_adapters  # a running request names the adapter that it began with

    def _start(self, args: EngineArgs, model_dir: Path) -> LLMEngine:
        """A few models, such as Gemma 2, have no head in vLLM: they compute with the embedding, and are served tied."""
        try:
            return LLMEngine.from_engine_args(args)
        except ValueError as error:
            head = self._tensors.head.removesuffix(".weight")
            if f"no module or parameter named '{head}'" not in str(error):
                raise
            self._unties = False
            args.model = str(self._make_view(model_dir))
            return LLMEngine.from_engine_args(args)

    # ── groups ───────────────────────────────────────────────────────────────────────────────────────────────────────
    def add(self, prompt: Sequence[int], n: int, sampling: Sampling, seed: int) -> int:
        """One request a group. With stop texts it is one a completion, seeded as vLLM does it: those end one by one.

        vLLM's own stop texts would need its tokenizer and cut the text but not the tokens: `StopTexts` ends requests.
        """
        number = next(self._numbers)
        copies = n if sampling.stop else 1
        names = [f"{number}/{index}" for index in range(copies)]
        self._groups[number] = _Group(stop_texts(sampling.stop, self._model_dir), names, [[] for _ in range(n)])
        for index, name in enumerate(names):
            params = SamplingParams(
                n=n // copies,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                top_k=sampling.top_k,
                min_p=sampling.min_p,
                repetition_penalty=sampling.repetition_penalty,
                max_tokens=sampling.max_tokens,
                seed=seed + index,
                stop_token_ids=[*self._ends, *sampling.stop_token_ids],
                logprobs=0,  # the sampled token's alone
                detokenize=False,
                output_kind=RequestOutputKind.CUMULATIVE if sampling.stop else RequestOutputKind.FINAL_ONLY,
            )
            self._engine.add_request(name, tokens_input(list(prompt)), params, lora_request=self._adapter)
        return number

    def step(self) -> Finished:
        """One step of vLLM's, in which each running request gets a token, or a few waiting ones are read."""
        for output in self._outputs():
            self._take(output)
        finished, self._finished = self._finished, []
        return finished

    @property
    def num_groups(self) -> int:
        """Groups that were added and are not complete."""
        return len(self._groups)

    def drop(self) -> None:
        """Forget the groups that are not complete."""
        self._engine.abort_request([name for group in self._groups.values() for name in group.names])
        self._groups, self._finished = {}, []

    def _outputs(self) -> list[RequestOutput]:
        return [output for output in self._engine.step() if isinstance(output, RequestOutput)]

    def _take(self, output: RequestOutput) -> None:
        number, first = map(int, output.request_id.split("/"))
        if (group := self._groups.get(number)) is None:
            return
        said = group.stop_texts.said([completion.token_ids for completion in output.outputs])
        for completion, has_said in zip(output.outputs, said):
            index = first + completion.index
            if completion.finish_reason is not None or has_said:
                group.made[index] = self._completion(completion, group.swaps[index], said=has_said)
        if any(said) and not output.finished:
            self._engine.abort_request([output.request_id])
        if len(group.made) == len(group.swaps):
            del self._groups[number]
            self._finished.append((number, [group.made[index] for index in range(len(group.swaps))]))

    def _completion(self, output: CompletionOutput, swaps: list[tuple[Version, int]], *, said: bool) -> Completion:
        assert output.logprobs is not None
        token_ids = list(output.token_ids)
        logp = [_logp(entry, token) for token, entry in zip(token_ids, output.logprobs)]
        truncated = output.finish_reason == "length" and not said
        return Completion(token_ids, logp, truncated, runs_of(swaps, self.version, len(token_ids)))

    # ── weights ──────────────────────────────────────────────────────────────────────────────────────────────────────
    def score(self, token_ids: list[list[int]]) -> list[list[float]]:
        """Log-probabilities at temperature 1 of tokens 1 and later; vLLM's prompt log-probabilities know no other."""
        params = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
        names = [f"{next(self._numbers)}/0" for _ in token_ids]
        scores: dict[str, list[float]] = {}
        with self._alone(), _in_words("vLLM starts on this model, but does not compute it"):
            for name, text in zip(names, token_ids):
                self._engine.add_request(name, tokens_input(text), params, lora_request=self._adapter)
            while len(scores) < len(names):
                for output in self._outputs():
                    if output.request_id in names:
                        scores[output.request_id] = _prompt_logps(output)
                    else:
                        self._take(output)
        return [scores[name] for name in names]

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Keeps the requests that wait out of the scheduler's sight: after `load_weights` those are all there are."""
        scheduler = self._engine.engine_core.engine_core.scheduler  # type: ignore[attr-defined]  # it is in this process
        waiting, scheduler.waiting = scheduler.waiting, type(scheduler.waiting)()
        try:
            yield
        finally:
            for request in scheduler.waiting:
                waiting.add_request(request)
            scheduler.waiting = waiting

    def load_weights(self, folder: Path, version: Version = UNNAMED) -> None:
        """Reload from the folder's files in place, or take its adapters, then drop all that is cached."""
        if self._takes_adapters:
            self._load_adapter(folder)
        else:
            self._reload(folder)
        self._note_swap()
        self.version = version
        if not self._engine.reset_prefix_cache(reset_running_requests=True):
            raise HeteroRLError("vLLM kept its prefix cache after a swap, and what follows would be of two versions")

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
        self._tensors.require_all(weight_files(folder))
        view = self._make_view(folder)
        try:
            with _in_words("vLLM serves this model, but takes no new weights for it"):
                self._engine.collective_rpc("reload_weights", kwargs={"weights_path": str(view)})
        finally:
            shutil.rmtree(view)

    def _note_swap(self) -> None:
        """Note how far each completion is; one without a state of its own is finished, and waits for its group."""
        states = self._engine.output_processor.request_states.values()
        tokens = {
            (state.external_req_id, state.request_index): state.detokenizer.num_output_tokens()
            for state in states
            if state.detokenizer
        }
        for number, group in self._groups.items():
            for index, swaps in enumerate(group.swaps):
                place = (f"{number}/{index}", 0) if len(group.names) > 1 else (f"{number}/0", index)
                swaps.append((self.version, tokens.get(place, _TO_THE_END)))

    def _make_view(self, folder: Path) -> Path:
        """A local folder of links to the weights, untied with a head of its own and a config that says so."""
        view = Path(self._views.name) / str(next(self._view_numbers))
        view.mkdir()
        files = weight_files(folder)
        for path in files:
            (view / path.name).symlink_to(path.resolve())
        if self._unties and (shared := self._tensors.shared_with_head(files)):
            with safe_open(_holder_of(shared, files), "pt") as tensors:
                save_file({self._tensors.head: tensors.get_tensor(shared)}, view / "head.safetensors")
        if (folder / "config.json").is_file():
            config = json.loads((folder / "config.json").read_text())
            ties = {"tie_word_embeddings": False} if self._unties else {}
            (view / "config.json").write_text(json.dumps(config | ties))
        return view

    def close(self) -> None:
        """Stop vLLM and remove the serving folders."""
        self._engine.engine_core.shutdown()
        del self._engine
        self._views.cleanup()


@contextmanager
def _in_words(what: str) -> Iterator[None]:
    """Says that vLLM cannot do it with this model, whatever it raises; what another try may mend stays as it is."""
    try:
        yield
    except (HeteroRLError, OSError, MemoryError, torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except Exception as error:
        said = " ".join(str(error).split())
        if "Free memory on device" in said:  # another process of this node holds it
            raise SiteError(f"vLLM does not start on this node: {said}") from error
        said = said if isinstance(error, ValueError) else f"{type(error).__name__}: {said}".removesuffix(": ")
        raise UserError(f"{what}: {said}; engine: transformers samples it without vLLM") from error


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


def _prompt_logps(output: RequestOutput) -> list[float]:
    assert output.prompt_logprobs is not None
    assert output.prompt_token_ids is not None
    return [_logp(entry, token) for token, entry in zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:])]


def _logp(entry: dict[int, Logprob] | None, token: int) -> float:
    """The token's log-probability; only a prompt's first token has no entry."""
    assert entry is not None
    return entry[token].logprob
