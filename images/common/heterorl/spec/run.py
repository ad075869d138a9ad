"""The run spec: every field of a `HeteroRLRun`, declared once.

The CRD (`heterorl.spec.crd`), `docs/spec.md` and the command line's help are generated from these classes. Learner,
sampler and operator read the same resolved spec. Fields are `snake_case` here and `camelCase` in YAML; the sentence
under a field is its documentation. Rules that span fields are `broken_rules`; their messages say what to write instead.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

from pydantic import Field

from heterorl.spec.base import (
    Block,
    BoardId,
    BoardProject,
    BoardTag,
    BoardText,
    BrokenRule,
    FreeForm,
    FunctionPath,
    Path_,
    PoolName,
    Quantity,
    RunName,
    Seed,
    ShortText,
    StopString,
    StringMap,
    Text,
    duplicates,
    list_map,
)
from heterorl.spec.pod_template import PodTemplateSpec

API_VERSION = "heterorl.dev/v1alpha1"
KIND = "HeteroRLRun"

_SLOT = re.compile(r"([a-z0-9]([-a-z0-9]*[a-z0-9])?)-(0|[1-9][0-9]*)")
MIN_TEMPERATURE = 0.01
"""Lowest sampling temperature: vLLM takes this one for any below it but 0, and the learner would not know."""

LossType = Literal[
    "grpo",
    "bnpo",
    "dr_grpo",
    "dapo",
    "gspo",
    "delta_l",
    "gepo",
    "gepo_plus",
    "eqp",
    "gmpo",
    "cispo",
    "topr",
    "impala",
    "sapo",
    "vespo",
]
RewardName = Literal[
    "accuracy",
    "format",
    "tag_count",
    "length",
    "cosine",
    "repetition",
    "language",
    "reasoning_steps",
    "boxed",
    "task",
    "custom",
]
PromptTemplate = Literal["chat", "think", "noThink", "raw"]


# ── model and data ───────────────────────────────────────────────────────────────────────────────────────────────────
class TinyModelSpec(Block):
    """A small Qwen3-architecture model with a byte-level tokenizer, built and briefly fine-tuned during preparation."""

    hidden_size: int = Field(128, ge=32, le=2048, multiple_of=32)
    """Hidden size; the head dimension is 32, so the number of attention heads is `hiddenSize / 32`."""
    num_layers: int = Field(3, ge=1, le=32)
    """Number of transformer layers."""
    tie_embeddings: bool = True
    """Tie the input embeddings to the output head, as Qwen3-0.6B to 4B do."""
    target_accuracy: float = Field(0.2, ge=0, le=0.95)
    """Fine-tune until held-out accuracy, sampled at temperature 1, exceeds this value; 0 skips fine-tuning."""
    max_supervised_steps: int = Field(2000, ge=0, le=100_000)
    """Maximum number of supervised fine-tuning steps, even if the target accuracy was not reached."""
    supervised_learning_rate: float = Field(1e-3, gt=0, le=1)
    """Learning rate of supervised fine-tuning (AdamW)."""
    seed: Seed = 0
    """Seed of the initial weights and of the order of the fine-tuning data."""


class LoraSpec(Block):
    """Low-rank adapters (LoRA, arXiv 2106.09685): layers compute with W + alpha / rank * B A; A and B are trained.

    There is no dropout: with it the learner's probabilities would not be the samplers'.
    """

    rank: int = Field(0, ge=0, le=512)
    """Rank of the adapters; 0 trains the whole model."""
    alpha: int = Field(32, ge=1, le=65_536)
    """Strength of the adapters, relative to rank."""
    target_modules: list[ShortText] = Field([], max_length=64)
    """Names of the linear layers that get an adapter, such as `q_proj`; empty: all of them but the output head."""
    seed: Seed = 0
    """Seed of the initial A; B starts at 0, so that the first version is the starting model."""
    output: Literal["merged", "adapter"] = "merged"
    """What `output/` is: merged: a whole model; adapter: the adapters alone, as peft reads them."""

    @property
    def is_on(self) -> bool:
        """Whether adapters are trained instead of the model."""
        return self.rank > 0

    def broken_rules(self) -> Iterable[BrokenRule]:
        """Without a rank there are no adapters to place or to write."""
        if not self.is_on and (self.target_modules or self.output == "adapter"):
            yield "rank", "is 0, so there are no adapters; set it to at least 1, or remove targetModules and output"


class ModelSpec(Block):
    """The policy to train."""

    source: Literal["path", "hub", "tiny"] = "tiny"
    """Where the initial weights come from: a folder, the Hugging Face Hub, or a tiny model built on the spot."""
    path: Path_ | None = None
    """Folder with config, tokenizer and safetensors (`source: path`), such as another run's output or checkpoint."""
    name: ShortText | None = None
    """Name of the model on the Hub, such as `Qwen/Qwen3-1.7B` (`source: hub`)."""
    revision: ShortText | None = None
    """Branch, tag or commit on the Hub; pin it so that later runs start from the same weights."""
    tiny: TinyModelSpec = TinyModelSpec()
    """Architecture and fine-tuning of the tiny model (`source: tiny`)."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Data type of training, of published weights and of generation."""
    attn_implementation: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    """Attention implementation of the learner; auto selects flash_attention_2 if it is installed, otherwise sdpa."""
    lora: LoraSpec = LoraSpec()
    """Train low-rank adapters instead of the whole model."""

    def broken_rules(self) -> Iterable[BrokenRule]:
        """A source needs its field."""
        if self.source == "path" and not self.path:
            yield "path", "is required with source: path; set it to the model's folder"
        if self.source == "hub" and not self.name:
            yield "name", "is required with source: hub; set it to a name such as Qwen/Qwen3-1.7B"


class ColumnsSpec(Block):
    """Column names; if a default column is missing, question is used for problem and solution for answer."""

    prompt: ShortText = "problem"
    """Column with the text of the problem."""
    answer: ShortText = "answer"
    """Column with the reference answer."""
    answer_pattern: ShortText | None = None
    """Regular expression whose first group is the answer, such as `#### (.+)`; default: the last box, or all of it."""
    strip_suffix: Text | None = None
    """Text removed from the end of each problem, for files whose problems already end with an instruction."""

    def broken_rules(self) -> Iterable[BrokenRule]:
        """The pattern is one of Python's regular expressions."""
        try:
            re.compile(self.answer_pattern or "")
        except (re.error, OverflowError, RecursionError) as error:
            yield "answerPattern", f"{self.answer_pattern!r} is not a valid regular expression: {error}"


class ArithmeticSpec(Block):
    """Built-in addition problems `a+b=`: unlimited, verifiable, and learnable by a tiny model."""

    digits: int = Field(2, ge=1, le=6)
    """Number of digits of each operand."""
    min_digits: int | None = Field(None, ge=1, le=6)
    """If set, sums of minDigits to digits digits alternate, as many of each."""
    rows: int = Field(4096, ge=1, le=1_000_000)
    """Number of problems to draw (with replacement if there are fewer distinct ones)."""
    seed: Seed = 0
    """Seed of the problems."""

    def broken_rules(self) -> Iterable[BrokenRule]:
        """The range is not empty."""
        if self.min_digits is not None and self.min_digits > self.digits:
            yield "minDigits", f"is {self.min_digits} and must be at most digits, which is {self.digits}"


class ReasoningTaskSpec(Block):
    """A task of the package reasoning-gym, generated and verified by it."""

    name: ShortText
    """Name of the task, such as `chain_sum`."""
    weight: float = Field(1.0, gt=0, le=1_000_000)
    """Share of the problems, relative to the other tasks."""
    level: int | None = Field(None, ge=0, le=1000)
    """Level of the task's curriculum, from 0; if it is not set, the default configuration of the package is used."""
    config: FreeForm = Field({})
    """Configuration of the task as the package names it, such as `{max_terms: 2}`; takes precedence over level."""


class ReasoningGymSpec(Block):
    """Problems of the package reasoning-gym (extra `reasoning`)."""

    tasks: list[ReasoningTaskSpec] = Field([], max_length=128)
    """Tasks to draw problems from; a task may be listed several times with different configurations."""
    rows: int = Field(4096, ge=1, le=1_000_000)
    """Number of problems, divided among the tasks by weight."""
    seed: Seed = 0
    """Seed of the problems; another seed gives others, as an evaluation set needs."""


DatasetSource = Literal["file", "hub", "arithmetic", "reasoningGym"]


class DatasetSpec(Block):
    """A dataset: files, a dataset on the Hub, built-in arithmetic, or tasks of reasoning-gym."""

    source: DatasetSource = "arithmetic"
    """Where the rows come from."""
    path: Path_ | None = None
    """File, glob or folder of save_to_disk (`source: file`), relative to the manifest or, on Kubernetes, the volume."""
    paths: list[Path_] = Field([], max_length=64)
    """Several of these, read one after the other, instead of path."""
    name: ShortText | None = None
    """Name of the dataset on the Hub, such as `openai/gsm8k` (`source: hub`)."""
    config: ShortText | None = None
    """Configuration of the Hub dataset, such as `main`."""
    revision: ShortText | None = None
    """Branch, tag or commit on the Hub."""
    split: ShortText = "train"
    """Split of a dataset on the Hub or of save_to_disk."""
    arithmetic: ArithmeticSpec = ArithmeticSpec()
    """The built-in problems (`source: arithmetic`)."""
    reasoning_gym: ReasoningGymSpec = ReasoningGymSpec()
    """Tasks of the package reasoning-gym (`source: reasoningGym`)."""
    columns: ColumnsSpec = ColumnsSpec()
    """Column names."""
    limit: int | None = Field(None, ge=1)
    """Use only the first N rows."""
    on_bad_row: Literal["refuse", "skip"] = "refuse"
    """refuse: a row that cannot be used ends the run before it starts; skip: it is left out and counted."""

    def broken_rules(self) -> Iterable[BrokenRule]:
        """A source needs its field."""
        if self.source == "file" and not self.path and not self.paths:
            yield "path", "is required with source: file; set it to a .jsonl, .json, .csv or .parquet file"
        if self.path and self.paths:
            yield "paths", "is given beside path; move the path into the list, or remove one of them"
        if self.source == "hub" and not self.name:
            yield "name", "is required with source: hub; set it to a name such as openai/gsm8k"
        if self.source == "reasoningGym" and not self.reasoning_gym.tasks:
            yield "reasoningGym.tasks", "is empty, but source is reasoningGym; add at least `- name: chain_sum`"


class EvalDatasetSpec(DatasetSpec):
    """A dataset to evaluate on."""

    label: PoolName
    """Short label of this dataset in metrics and tables, such as `math500`."""


class MixedDatasetSpec(DatasetSpec):
    """One of several datasets to train on."""

    label: PoolName
    """Short label of this dataset in metrics, such as `geometry`."""
    weight: float = Field(1.0, gt=0, le=1_000_000)
    """Share of the prompts that are drawn from it, relative to the weights of the others."""


class TrainDatasetSpec(DatasetSpec):
    """The dataset to train on, or several of them mixed."""

    source: Literal[DatasetSource, "mix"] = "arithmetic"  # type: ignore[assignment]  # wider; `sets` narrows it again
    """Where the rows come from; mix: from several datasets."""
    mix: list[MixedDatasetSpec] = Field([], max_length=16, json_schema_extra=list_map("label"))
    """The datasets to draw from by weight (`source: mix`)."""

    def broken_rules(self) -> Iterable[BrokenRule]:
        """A mix needs its datasets, whose labels differ."""
        yield from super().broken_rules()
        if self.source == "mix" and not self.mix:
            yield "mix", "is required with source: mix; list datasets, each with a label and a weight"
        if self.source != "mix" and self.mix:
            yield "mix", f"is used only with source: mix; set that instead of {self.source}, or remove the list"
        yield from duplicates("mix", [dataset.label for dataset in self.mix])

    @property
    def sets(self) -> Sequence[DatasetSpec]:
        """The datasets themselves: those of a mix, or this one."""
        return self.mix or [self]

    @property
    def weights(self) -> dict[str, float]:
        """Weights by label; none where there is one dataset."""
        return {dataset.label: dataset.weight for dataset in self.mix}


class DataSpec(Block):
    """What to train and evaluate on."""

    train: TrainDatasetSpec = TrainDatasetSpec()
    """Problems that the samplers draw prompts from."""
    evals: list[EvalDatasetSpec] = Field([], max_length=16, json_schema_extra=list_map("label"))
    """Datasets for evaluation."""
    prompt_template: PromptTemplate = "raw"
    """chat: the problem as a chat; think: reason, then box the answer; noThink: box it at once; raw: the text alone."""
    system_prompt: Text | None = None
    """Text of the system turn, instead of the template's own; an empty one omits the turn."""
    instruction: Text | None = None
    """Text of the user's turn, with `{problem}` where the problem belongs, instead of the template's own."""
    order: Literal["shuffled", "adaptive"] = "shuffled"
    """shuffled: every prompt once in an epoch; adaptive: of a few next ones, the prompt of most uncertain success."""
    shuffle_seed: Seed = 0
    """Seed of the prompt order; each sampler works through its own shard of it."""

    def broken_rules(self) -> Iterable[BrokenRule]:
        """Labels differ, and the texts around a problem have a place."""
        yield from duplicates("evals", [dataset.label for dataset in self.evals])
        if self.instruction is not None and "{problem}" not in self.instruction:
            yield "instruction", "does not contain {problem}; write it where the text of the problem belongs"
        if self.prompt_template == "raw" and self.system_prompt is not None:
            yield "systemPrompt", "has no turn with promptTemplate: raw; set promptTemplate: chat, or use instruction"


# ── rewards and algorithm ────────────────────────────────────────────────────────────────────────────────────────────
class RewardSpec(Block):
    """A reward function and its weight in the sum."""

    name: RewardName = "accuracy"
    """accuracy, format, tag_count, length, cosine, repetition, language, reasoning_steps, boxed, task, or custom."""
    weight: float = Field(1.0, ge=-1000, le=1000)
    """Weight of this reward in the sum."""
    path: FunctionPath | None = None
    """Import path of a function `(completions, **columns) -> list[float | None]` (`name: custom`)."""
    batched: bool = False
    """custom: call the function once with all completions of a generated batch, as TRL does, not once per group."""
    max_length: int = Field(1024, ge=1, le=1_000_000)
    """length, cosine: completion length, in tokens, at which the reward reaches its final value."""
    ngram_size: int = Field(3, ge=1, le=64)
    """repetition: size of the word n-grams whose repetition is penalized."""
    max_penalty: float = Field(-1.0, ge=-1000, le=0)
    """repetition: reward if every n-gram is repeated."""
    require_value: bool | None = None
    """accuracy: whether `5+7` is wrong where the reference is `12`; unset, for built-in sums and reasoning-gym only."""
    language: Literal["en", "zh"] = "en"
    """language: language in whose script the completion should be written."""
    time_limit_seconds: float | None = Field(None, gt=0, le=3600)
    """Time limit of one call (default 60); of one answer for accuracy and task (default 2), which then is wrong."""
    memory_limit_bytes: int = Field(4_294_967_296, ge=67_108_864)
    """custom: memory that the function may have, in bytes."""
    on_error: Literal["retry", "zero", "skipGroup", "fail"] = "retry"
    """If a call fails: retry, then leave the group out; count it as zero; skipGroup; or fail: the sampler ends."""
    retries: int = Field(2, ge=0, le=100)
    """onError retry: how often a failed call is repeated before the group is left out."""
    error_budget: int = Field(16, ge=1, le=1_000_000)
    """Groups in a row on which this reward may fail; at that many the sampler ends."""

    def broken_rules(self) -> Iterable[BrokenRule]:
        """A path belongs to a custom reward."""
        if self.name == "custom" and not self.path:
            yield "path", "is required with name: custom; set it to package.module.function"
        if self.name != "custom" and self.path:
            yield "path", f"is allowed only with name: custom; remove it, or set name: custom instead of {self.name}"


class RatioClipSpec(Block):
    """Clipping of an importance ratio to [1 - low, 1 + high]."""

    low: float = Field(0.2, ge=0, le=1)
    """Lower clipping range ε_low."""
    high: float = Field(0.2, ge=0, le=1000)
    """Upper clipping range ε_high."""
    delta: float | None = Field(None, gt=1, le=1000)
    """Two-sided clipping: upper bound of the unclipped ratio, so that the loss is bounded for A < 0 too."""


class DrGrpoSpec(RatioClipSpec):
    """Dr.GRPO (arXiv 2503.20783)."""


class DeltaLSpec(RatioClipSpec):
    """ΔL Normalization (arXiv 2509.07558)."""

    alpha: float = Field(0.75, ge=0, le=1)
    """Exponent of the length in the weight of a sequence; 0 is Dr.GRPO's constant, 1 minimizes the variance."""


class GepoPlusSpec(RatioClipSpec):
    """GEPO that uses GSPO's denominator while the learner is close to the sampler's policy."""

    kl_threshold: float = Field(0.002, ge=0, le=100)
    """KL divergence between learner and sampler below which a sequence uses GSPO's denominator."""


class GmpoSpec(Block):
    """GMPO (arXiv 2507.20673): clipping of the log ratio of a token."""

    low: float = Field(0.4, ge=0, le=100)
    """The log ratio is clipped below at -low."""
    high: float = Field(0.4, ge=0, le=100)
    """The log ratio is clipped above at high."""


class CispoSpec(Block):
    """CISPO (arXiv 2506.13585): an upper bound of the detached token ratio."""

    cap: float = Field(5.0, gt=0, le=1000)
    """Upper bound of the weight of a token."""


class ToprSpec(Block):
    """TOPR (arXiv 2503.14286): ratio of the whole trajectory, truncated for negative advantages."""

    cap: float = Field(1.0, gt=0, le=1000)
    """Upper bound of the weight of a trajectory with a negative advantage."""


class ImpalaSpec(Block):
    """IMPALA's V-trace weight (arXiv 1802.01561), without a value function."""

    rho_bar: float = Field(1.0, gt=0, le=1000)
    """Upper bound of the weight of a token."""


class SapoSpec(Block):
    """SAPO (arXiv 2511.20347): temperatures of the sigmoid that takes the place of a clip."""

    tau_pos: float = Field(1.0, gt=0, le=1000)
    """Temperature for positive advantages."""
    tau_neg: float = Field(1.05, gt=0, le=1000)
    """Temperature for negative advantages; the larger, the sooner a token off the policy loses its gradient."""


class VespoSpec(Block):
    """VESPO (arXiv 2602.10693): the weight W^k exp(λ (1 - W)) of a sequence."""

    k_pos: float = Field(2.0, ge=0, le=1000)
    """k for advantages that are not negative."""
    lambda_pos: float = Field(3.0, gt=0, le=1000)
    """λ for advantages that are not negative."""
    k_neg: float = Field(3.0, ge=0, le=1000)
    """k for negative advantages."""
    lambda_neg: float = Field(2.0, gt=0, le=1000)
    """λ for negative advantages."""


class LossSpec(Block):
    """The policy loss: a type and that type's own parameters."""

    type: LossType = "gepo"
    """Which loss to train with."""
    grpo: RatioClipSpec = RatioClipSpec()
    """GRPO (arXiv 2402.03300): token-level ratio, mean over each sequence."""
    bnpo: RatioClipSpec = RatioClipSpec()
    """BNPO (arXiv 2506.02864): Beta-normalized advantages, mean over all tokens."""
    dr_grpo: DrGrpoSpec = Field(DrGrpoSpec(), alias="dr_grpo")
    """Dr.GRPO: token-level ratio, divided by a constant length."""
    dapo: RatioClipSpec = RatioClipSpec()
    """DAPO (arXiv 2503.14476): token-level ratio, mean over all tokens of the step."""
    gspo: RatioClipSpec = RatioClipSpec()
    """GSPO (arXiv 2507.18071): sequence-level ratio."""
    delta_l: DeltaLSpec = Field(DeltaLSpec(), alias="delta_l")
    """ΔL Normalization: sequences weighted by a power of their length."""
    gepo: RatioClipSpec = RatioClipSpec()
    """GEPO (arXiv 2508.17850): sequence-level ratio with the expectation over the prompt's group as denominator."""
    gepo_plus: GepoPlusSpec = Field(GepoPlusSpec(), alias="gepo_plus")
    """GEPO that falls back to GSPO's denominator while the learner is close to the sampler's policy."""
    eqp: RatioClipSpec = RatioClipSpec()
    """GEPO with E_q[p] as denominator; needs whole groups in a micro-batch."""
    gmpo: GmpoSpec = GmpoSpec()
    """GMPO: geometric mean of the clipped token ratios."""
    cispo: CispoSpec = CispoSpec()
    """CISPO: detached, capped token weights."""
    topr: ToprSpec = ToprSpec()
    """TOPR: detached trajectory weights, one-sided."""
    impala: ImpalaSpec = ImpalaSpec()
    """IMPALA: detached, truncated token weights."""
    sapo: SapoSpec = SapoSpec()
    """SAPO: token-level ratio through a sigmoid instead of a clip."""
    vespo: VespoSpec = VespoSpec()
    """VESPO: detached, smoothly tapered sequence weights."""


class AdvantageSpec(Block):
    """How rewards become advantages."""

    scale: Literal["auto", "none", "group", "batch", "beta"] = "auto"
    """auto: as in the loss's paper; none: reward - group mean; group, batch: divided by that std; beta: as in BNPO."""


class KlToSamplerSpec(Block):
    """CPPO-KL: a penalty that keeps the learner close to the policy that generated the data (k3 estimator)."""

    weight: float = Field(0.0, ge=0, le=100)
    """Weight of the penalty; the paper uses 0.005."""


class KlToReferenceSpec(Block):
    """A penalty that keeps the learner close to the model that the run started from (k3 estimator)."""

    weight: float = Field(0.0, ge=0, le=100)
    """Weight of the penalty; above 0 each rank holds the starting model in model.dtype as well, unless model.lora."""


class WeightSpec(Block):
    """The importance weight ρ = p/q from the sampler's policy to the learner's, without gradient."""

    type: Literal["none", "truncate", "mask"] = "none"
    """truncate (TIS): ρ held within low and high; mask (IcePop, MIS): ρ if it is within them, otherwise 0."""
    level: Literal["token", "sequence"] = "token"
    """token: ρ of each token; sequence: product over the completion's tokens."""
    low: float = Field(0.0, ge=0, le=1)
    """Lower bound; IcePop uses 0.5."""
    high: float = Field(2.0, ge=1, le=1_000_000)
    """Upper bound; IcePop uses 5."""


class RejectSpec(Block):
    """Rejection of completions that are too far from the sampler's policy."""

    type: Literal["none", "geometric", "k3"] = "none"
    """geometric: by the geometric mean of p/q over the tokens; k3: by their mean k3."""
    low: float = Field(0.5, ge=0, le=1)
    """geometric: smallest ratio that is kept."""
    high: float = Field(2.0, ge=1, le=1_000_000)
    """geometric: largest ratio that is kept."""
    max_k3: float = Field(0.1, gt=0, le=1_000_000)
    """k3: largest mean that is kept."""


class CorrectionSpec(Block):
    """Corrections for data of another policy, for any loss; those that are on multiply."""

    weight: WeightSpec = WeightSpec()
    """Importance weight of each token; the loss's own ratio is then against the learner instead of the sampler."""
    reject: RejectSpec = RejectSpec()
    """Rejection of whole completions."""
    opsm_delta: float | None = Field(None, ge=0, le=1000)
    """OPSM: drop a completion if its advantage is negative and its mean log(q/p) exceeds this; such as 0.5."""
    m2po_tau: float | None = Field(None, gt=0, le=1000, alias="m2poTau")
    """M2PO: mask the tokens of largest (log p/q)² until the mean is at most this, such as 0.04; a forward pass more."""

    @property
    def weighs(self) -> bool:
        """Whether there is an importance weight."""
        return self.weight.type != "none"

    @property
    def is_on(self) -> bool:
        """Whether anything is corrected."""
        return self.weighs or self.reject.type != "none" or self.opsm_delta is not None or self.m2po_tau is not None


class StalenessSpec(Block):
    """How old a rollout may be when it is trained on."""

    max_steps: int = Field(64, ge=0, le=100_000)
    """Maximum lag: learner step minus the step of the weights that generated the rollout."""
    policy: Literal["drop", "wait"] = "drop"
    """drop: rollouts beyond maxSteps are dropped and counted; wait: samplers pause before they would produce them."""


class AlgorithmSpec(Block):
    """Loss, group size, advantages and staleness."""

    loss: LossSpec = LossSpec()
    """Policy loss."""
    group_size: int = Field(8, ge=1, le=1024)
    """Number of completions generated per prompt."""
    advantage: AdvantageSpec = AdvantageSpec()
    """How rewards become advantages."""
    correction: CorrectionSpec = CorrectionSpec()
    """Corrections for data of another policy, independent of the loss."""
    kl_to_sampler: KlToSamplerSpec = KlToSamplerSpec()
    """KL penalty towards the sampler's policy."""
    kl_to_reference: KlToReferenceSpec = KlToReferenceSpec()
    """KL penalty towards the starting model."""
    staleness: StalenessSpec = StalenessSpec()
    """Maximum age of rollouts."""
    mask_truncated: bool = False
    """Exclude completions that hit the length limit from the loss."""
    filter_groups: Literal["none", "zeroVariance"] = "none"
    """zeroVariance: samplers do not publish groups whose rewards are all equal, which have no advantage (DAPO)."""

    def broken_rules(self) -> Iterable[BrokenRule]:
        """Advantages compare the completions of a group."""
        if self.group_size == 1:
            yield "groupSize", "is 1, but advantages are relative to the group mean; set it to at least 2"

    @property
    def needs_whole_groups(self) -> bool:
        """Whether the loss reads the learner's probabilities of a prompt's whole group at once."""
        return self.loss.type == "eqp" or (self.loss.type in ("gepo", "gepo_plus") and self.correction.weighs)


class GenerationSpec(Block):
    """How completions are sampled."""

    temperature: float = Field(1.0, ge=MIN_TEMPERATURE, le=100)
    """Sampling temperature, at which the learner computes log-probabilities too; vLLM knows none from 0 to 0.01."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Top-p (nucleus) sampling; 1 disables. Importance ratios are biased if it is below 1."""
    top_k: int = Field(0, ge=0, le=1_000_000)
    """Top-k sampling; 0 disables. Importance ratios are biased if it is enabled."""
    min_p: float = Field(0.0, ge=0, lt=1)
    """Min-p sampling: minimum probability relative to the most likely token; 0 disables."""
    repetition_penalty: float = Field(1.0, gt=0, le=10)
    """Repetition penalty on tokens seen so far; 1 disables."""
    max_prompt_tokens: int = Field(768, ge=1, le=1_000_000)
    """Maximum length of a prompt; longer prompts are skipped and counted."""
    max_completion_tokens: int = Field(1024, ge=1, le=1_000_000)
    """Maximum length of a completion; a longer one is cut and marked as truncated."""
    stop: list[StopString] = Field([], max_length=16)
    """Texts that end a completion, which keeps the token that completes one; special tokens count by their text."""
    stop_token_ids: list[Annotated[int, Field(ge=0)]] = Field([], max_length=64)
    """Tokens that end a completion, which keeps them, besides the model's end-of-sequence tokens."""
    seed: Seed = 0
    """Seed of sampling; each sampler derives its own."""

    @property
    def is_truncated(self) -> bool:
        """Whether the sampling distribution differs from the model's softmax, so that importance ratios are biased."""
        return self.top_p < 1 or self.top_k > 0 or self.min_p > 0 or self.repetition_penalty != 1


# ── learner ──────────────────────────────────────────────────────────────────────────────────────────────────────────
class LearnerBatchSpec(Block):
    """What one optimizer step trains on."""

    groups: int = Field(32, ge=1, le=65_536)
    """Number of groups per optimizer step, each with groupSize completions of one prompt."""
    tokens_per_micro_batch: int = Field(8192, ge=1, le=10_000_000)
    """Token budget of one forward and backward pass; a longer sequence is a micro-batch of its own."""


class OptimizerSpec(Block):
    """AdamW."""

    type: Literal["adamw", "adamw_fused", "adamw_8bit"] = "adamw"
    """adamw_fused: one kernel for all tensors; adamw_8bit: moments in 8 bits by bitsandbytes, on GPUs without ZeRO."""
    learning_rate: float = Field(1e-6, gt=0, le=1)
    """Peak learning rate."""
    betas: list[Annotated[float, Field(ge=0, lt=1)]] = Field([0.9, 0.999], min_length=2, max_length=2)
    """Decay rates of the first and second moments."""
    eps: float = Field(1e-8, gt=0, le=1)
    """Term added to the denominator for numerical stability."""
    weight_decay: float = Field(0.0, ge=0, le=10)
    """Decoupled weight decay."""
    max_grad_norm: float = Field(1.0, gt=0, le=1_000_000)
    """Maximum gradient norm; larger gradients are scaled down to it."""
    ess_scaling: bool = False
    """VCPO: multiply the rate of a step by sqrt(ESS/B), where ESS is the effective number of its B completions."""


class ScheduleSpec(Block):
    """Learning rate schedule."""

    type: Literal["constant", "cosine", "linear"] = "constant"
    """Shape after the warm-up."""
    warmup_ratio: float = Field(0.03, ge=0, lt=1)
    """Fraction of the steps during which the learning rate rises linearly from 0."""


class PublishSpec(Block):
    """When weights are published."""

    every_steps: int = Field(1, ge=1, le=100_000)
    """Publish weights every N optimizer steps."""


class CheckpointSpec(Block):
    """When the full state of the learner is saved."""

    every_steps: int = Field(50, ge=1, le=1_000_000)
    """Save a checkpoint every N optimizer steps; a restart repeats at most N steps."""
    keep: int = Field(2, ge=1, le=1000)
    """Number of newest checkpoints to keep."""
    keep_best: PoolName | None = None
    """Label of an evaluation set: the checkpoint with the best mean@k on it is kept as well."""


class LogCompletionsSpec(Block):
    """Log of completions with their rewards, advantages and importance ratios, for `heterorl ui`."""

    max_megabytes: float = Field(16.0, ge=0, le=1_000_000)
    """Maximum size of `completions.jsonl`; whole groups are sampled evenly over the steps. 0 disables."""
    groups_per_step: int = Field(4, ge=1, le=1_000_000)
    """Maximum number of groups of a step; more of them slow the learner down."""


class LogAnswersSpec(Block):
    """Log of what was answered in evaluations, by problem, for `heterorl ui`."""

    max_megabytes: float = Field(16.0, ge=0, le=1_000_000)
    """Maximum size of `answers/`, in equal parts for each evaluation, of the same problems in each. 0 disables."""


class WandbSpec(Block):
    """Weights & Biases; needs the wandb package and an API key in the environment.

    Its own variables, such as WANDB_ENTITY or WANDB_TAGS, go before these fields.
    """

    project: BoardProject | None = None
    """W&B project; W&B is disabled if it is not set."""
    entity: BoardText | None = None
    """User or team that owns the project; default: that of the API key."""
    name: BoardText | None = None
    """Name of the W&B run; default: the name of this run."""
    group: BoardText | None = None
    """Group of the W&B run, such as the runs of several seeds."""
    tags: list[BoardTag] = Field([], max_length=32)
    """Tags of the W&B run."""
    notes: Text | None = None
    """Notes on the W&B run."""
    mode: Literal["online", "offline"] = "online"
    """online, or offline: write to the run's folder, to be synced later."""
    id: BoardId | None = None
    """Id of the W&B run, kept over restarts; default: the name of this run with a suffix that no other has."""


class TrackioSpec(Block):
    """Trackio, whose dashboard `trackio show` opens on this machine; needs the trackio package."""

    project: BoardProject | None = None
    """Trackio project; Trackio is disabled if it is not set."""
    name: BoardText | None = None
    """Name of the run in it; default: the id of this run, its name with a suffix that no other has."""
    group: BoardText | None = None
    """Group of the run, such as the runs of several seeds."""
    space: BoardText | None = None
    """Space on the Hugging Face Hub to log to, such as my-team/far; default: files on this machine."""


class MonitoringSpec(Block):
    """Where metrics are written besides JSONL."""

    prometheus_port: int = Field(0, ge=0, le=65_535)
    """Port of /metrics of each process; 0 takes any free port and records it in the run's folder."""
    tensorboard: bool = True
    """Write TensorBoard event files."""
    wandb: WandbSpec = WandbSpec()
    """Weights & Biases."""
    trackio: TrackioSpec = TrackioSpec()
    """Trackio."""
    entropy_every_steps: int = Field(10, ge=0, le=1_000_000)
    """Compute the policy's entropy every N steps, which takes a forward pass; 0 disables."""
    log_completions: LogCompletionsSpec = LogCompletionsSpec()
    """Log of completions."""
    log_answers: LogAnswersSpec = LogAnswersSpec()
    """Log of the answers in evaluations."""
    page: bool = False
    """On Kubernetes: serve `heterorl ui` in a container beside the learner, for `kubectl port-forward` (docs/ui.md)."""


class LearnerSpec(Block):
    """The learner: the process, or the set of ranks, that trains."""

    steps: int = Field(1000, ge=1, le=10_000_000)
    """Number of optimizer steps of the run."""
    batch: LearnerBatchSpec = LearnerBatchSpec()
    """Batch size of a step."""
    optimizer: OptimizerSpec = OptimizerSpec()
    """Parameters of AdamW."""
    schedule: ScheduleSpec = ScheduleSpec()
    """Learning rate schedule."""
    strategy: Literal["torch", "zero1", "zero2", "zero3"] = "torch"
    """torch: plain PyTorch (DDP with several processes); zero1 to zero3: DeepSpeed."""
    replicas: int = Field(1, ge=1, le=256)
    """Number of learner pods (on one machine, nodes are emulated as processes)."""
    processes_per_replica: int = Field(1, ge=1, le=64)
    """Ranks per replica; with GPUs one rank per GPU, so the same number as gpus."""
    gpus: int = Field(0, ge=0, le=64)
    """GPUs per replica; 0 trains on the CPU."""
    threads: int = Field(0, ge=0, le=1024)
    """CPU threads per rank; 0 divides the cores of the machine evenly."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass to save memory."""
    publish: PublishSpec = PublishSpec()
    """When weights are published."""
    checkpoint: CheckpointSpec = CheckpointSpec()
    """When checkpoints are saved and how many are kept."""
    stall_seconds: float = Field(1800.0, gt=0, le=1_000_000)
    """Warn if no usable rollouts have arrived for this long."""
    finish_grace_seconds: float = Field(300.0, ge=0, le=86_400)
    """On Kubernetes: how long the learner pod idles after it has finished, so that its log can still be read."""
    pod_template: PodTemplateSpec = PodTemplateSpec()
    """Pod template of the learner and of the preparation."""

    def broken_rules(self) -> Iterable[BrokenRule]:
        """One rank drives one GPU; 8-bit moments are bitsandbytes' own, on GPUs."""
        if self.optimizer.type == "adamw_8bit" and (self.gpus == 0 or self.strategy != "torch"):
            yield (
                "optimizer.type",
                f"is adamw_8bit, which needs GPUs and strategy: torch; found gpus: {self.gpus} and strategy:"
                f" {self.strategy}. ZeRO divides the moments among the ranks instead: use adamw with it",
            )
        if self.gpus and self.processes_per_replica != self.gpus:
            yield (
                "processesPerReplica",
                (
                    f"is {self.processes_per_replica}, but gpus is {self.gpus} and each rank drives one GPU;"
                    f" set processesPerReplica: {self.gpus}"
                ),
            )

    @property
    def world_size(self) -> int:
        """Ranks in all."""
        return self.replicas * self.processes_per_replica


# ── samplers ─────────────────────────────────────────────────────────────────────────────────────────────────────────
class DelayTraceSpec(Block):
    """Recorded delays, replayed in order and repeated from the start."""

    path: Path_ | None = None
    """CSV file, relative to the manifest's folder or, on Kubernetes, to the volume."""
    column: ShortText | None = None
    """Column with the delays."""
    values: list[Annotated[float, Field(ge=0)]] = Field([], max_length=4096)
    """The delays themselves, instead of a file."""


class DelaySpec(Block):
    """When a sampler may adopt new weights; sampled delays are clamped to [lower, upper]."""

    distribution: Literal["none", "constant", "lognormal", "weibull", "exponential", "trace"] = "none"
    """Distribution of the delay."""
    model: Literal["hold", "transit"] = "hold"
    """hold: adopt the newest weights once the delay has passed since the last swap; transit: see each version late."""
    unit: Literal["seconds", "steps"] = "seconds"
    """Unit of the delay: seconds, or learner steps as counted by the newest published version."""
    lower: float = Field(60.0, ge=0, le=1_000_000)
    """Lower quantile of the distribution and minimum delay; the delay itself if constant."""
    upper: float = Field(1920.0, ge=0, le=1_000_000)
    """Upper quantile of the distribution and maximum delay."""
    confidence: float = Field(0.995, gt=0.5, lt=1)
    """Probability that a delay is below the upper quantile, and that it is above the lower one."""
    subtract: float = Field(0.0, ge=0, le=1_000_000)
    """Subtracted from each sampled delay before clamping: time that real work takes (400 in the paper's 1L2S)."""
    trace: DelayTraceSpec = DelayTraceSpec()
    """The recorded delays (`distribution: trace`)."""
    seed: Seed = 0
    """Seed of the sampled delays; each sampler derives its own."""

    def broken_rules(self) -> Iterable[BrokenRule]:
        """The bounds of the distribution make sense; a trace is given."""
        if self.distribution in ("lognormal", "weibull", "exponential") and self.lower >= self.upper:
            yield (
                "lower",
                (
                    f"is {self.lower:g} and must be below upper, which is {self.upper:g};"
                    " for a fixed delay set distribution: constant"
                ),
            )
        if self.distribution in ("lognormal", "weibull") and self.lower <= 0:
            yield "lower", f"is {self.lower:g} and must be above 0 for a {self.distribution} distribution"
        if self.distribution == "trace" and bool(self.trace.path) == bool(self.trace.values):
            yield "trace", "needs either path (a CSV file, together with column) or values"
        if self.trace.path and not self.trace.column:
            yield "trace.column", "is required with trace.path; set it to the column with the delays"


class WindowSpec(Block):
    """A time window, in seconds since the start of the run."""

    start_seconds: float = Field(ge=0)
    """Start of the window."""
    end_seconds: float = Field(gt=0)
    """End of the window (exclusive)."""
    replicas: int = Field(ge=0, le=1024)
    """Replicas during the window."""

    def broken_rules(self) -> Iterable[BrokenRule]:
        """It ends after it starts."""
        if self.start_seconds >= self.end_seconds:
            yield "startSeconds", f"is {self.start_seconds:g} and must be below endSeconds, {self.end_seconds:g}"


class ChurnSpec(Block):
    """Each replica goes up and down independently, with exponentially distributed times."""

    mean_up_seconds: float = Field(600.0, gt=0, le=10_000_000)
    """Mean time that a replica stays up."""
    mean_down_seconds: float = Field(120.0, gt=0, le=10_000_000)
    """Mean time that a replica stays down."""
    seed: Seed = 0
    """Seed of the times; each replica derives its own."""


class AvailabilityPointSpec(Block):
    """The number of replicas from a point in time on."""

    at_seconds: float = Field(ge=0)
    """Seconds since the start of the run."""
    replicas: int = Field(ge=0, le=1024)
    """Number of replicas from then on."""


class AvailabilitySpec(Block):
    """How many replicas of a pool exist at a given time of the run; never more than `replicas`."""

    type: Literal["always", "windows", "churn", "trace"] = "always"
    """Kind of availability."""
    windows: list[WindowSpec] = Field([], max_length=64)
    """Time windows with their replicas: where windows overlap, the largest number counts; outside them it is 0."""
    churn: ChurnSpec = ChurnSpec()
    """Random churn of replicas."""
    trace: list[AvailabilityPointSpec] = Field([], max_length=1024, json_schema_extra=list_map("atSeconds"))
    """Replicas over time, as a step function; before the first point all replicas exist."""

    def broken_rules(self) -> Iterable[BrokenRule]:
        """A type needs its field; times rise."""
        if self.type == "windows" and not self.windows:
            yield "windows", "is empty, but type is windows; add at least one window, or set type: always"
        if self.type == "trace" and not self.trace:
            yield "trace", "is empty, but type is trace; add at least one point, or set type: always"
        times = [point.at_seconds for point in self.trace]
        if times != sorted(set(times)):
            yield "trace", "is out of order; atSeconds must increase from point to point"


@dataclass(frozen=True, order=True)
class Slot:
    """A sampler's place: its pool and index. Identity, seed, prompt cursor and delays belong to the slot."""

    pool: str
    index: int

    def __str__(self) -> str:
        return f"{self.pool}-{self.index}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """The slot with that name; ValueError if it is none."""
        if not (match := _SLOT.fullmatch(text)):
            raise ValueError(f"{text!r} is not a slot; expected a name such as far-0")
        return cls(match[1], int(match[3]))


class SamplerPoolSpec(Block):
    """A pool of alike samplers: same engine, delay distribution and availability."""

    name: PoolName
    """Name of the pool."""
    replicas: int = Field(1, ge=0, le=1024)
    """Number of samplers in the pool."""
    engine: Literal["vllm", "transformers"] = "vllm"
    """Inference engine: vllm for real models (GPU or CPU); transformers for tiny models and parity tests."""
    prompts_per_batch: int = Field(8, ge=1, le=65_536)
    """Number of prompts in generation at a time; as many again are queued behind them, so that it never drains."""
    swap: Literal["inflight", "drain"] = "inflight"
    """Adopt weights in the midst of generation (tokens carry their version), or once the running groups are done."""
    delay: DelaySpec = DelaySpec()
    """When new weights may be adopted."""
    availability: AvailabilitySpec = AvailabilitySpec()
    """When the replicas exist."""
    gpus: int = Field(0, ge=0, le=64)
    """GPUs per replica; 0 generates on the CPU."""
    tensor_parallel: int = Field(1, ge=1, le=64)
    """Tensor parallel size of vLLM."""
    gpu_memory_utilization: float = Field(0.9, gt=0, le=1)
    """Fraction of GPU memory that vLLM may use."""
    kv_cache_bytes: int = Field(268_435_456, ge=1_048_576)
    """Size of vLLM's KV cache on the CPU, in bytes."""
    fetch_bytes_per_second: int = Field(0, ge=0, le=10**12)
    """Most bytes per second that a replica reads of new weights; 0: no limit."""
    threads: int = Field(0, ge=0, le=1024)
    """CPU threads per replica; 0 divides the cores of the machine evenly."""
    lora: Literal["merged", "adapter"] = "merged"
    """With model.lora: merge each version into the weights, or have vLLM compute the adapter beside them."""
    pod_template: PodTemplateSpec = PodTemplateSpec()
    """Pod template of the pool."""

    def broken_rules(self) -> Iterable[BrokenRule]:
        """Adapters beside the weights are vLLM's; tensor parallelism needs that many GPUs."""
        if self.lora == "adapter" and self.engine != "vllm":
            yield "lora", f"is adapter, which engine: {self.engine} does not serve; set merged, or engine: vllm"
        if self.gpus and self.tensor_parallel > self.gpus:
            yield (
                "tensorParallel",
                f"is {self.tensor_parallel}, but gpus is {self.gpus}; set gpus: {self.tensor_parallel}",
            )


# ── exchange, evaluation, life cycle ─────────────────────────────────────────────────────────────────────────────────
class VolumeSpec(Block):
    """The shared volume on Kubernetes: an existing PersistentVolumeClaim, or one that the operator creates."""

    claim_name: ShortText | None = None
    """Name of an existing PersistentVolumeClaim to use."""
    size: Quantity = "100Gi"
    """Size of a new claim; Kubernetes can expand a claim but not shrink it."""
    storage_class_name: ShortText | None = None
    """Storage class of a new claim."""
    access_modes: list[Literal["ReadWriteMany", "ReadWriteOnce"]] = Field(["ReadWriteMany"], min_length=1, max_length=2)
    """Access modes of a new claim; with ReadWriteOnce all pods run on one node."""


class RetentionSpec(Block):
    """What is kept on the volume."""

    weights: int = Field(3, ge=2, le=10_000)
    """Number of newest published versions to keep; versions that a transit delay still needs, and the deltas that lead
    to these, are kept as well.
    """
    keep_rollouts: bool = False
    """Keep rollouts after training, for example to replay them with another loss."""
    volume: Literal["Retain", "Delete"] = "Retain"
    """What happens to a claim created by the operator when the run is deleted."""


class CanarySpec(Block):
    """The check that a sampler computes what the learner computes."""

    tolerance: float | None = Field(None, gt=0, le=100)
    """Maximum mean absolute difference of a token's log-probability; default: 1e-4 in float32, 0.1 in bfloat16."""


class ExchangeSpec(Block):
    """The exchange on the shared volume: retention, limits and checks."""

    volume: VolumeSpec = VolumeSpec()
    """The volume on Kubernetes."""
    retention: RetentionSpec = RetentionSpec()
    """What is kept on the volume."""
    max_pending_groups: int = Field(64, ge=1, le=1_000_000)
    """Backpressure: a sampler pauses while this many of its groups are waiting to be trained on."""
    poll_seconds: float = Field(0.5, gt=0, le=3600)
    """How often a waiting process polls the volume."""
    lease_seconds: float = Field(60.0, gt=0, le=86_400)
    """Lease duration: a slot whose heartbeat has not changed for this long may be taken over."""
    deltas: bool = True
    """Publish what has changed since earlier weights where that is less than half of them, instead of whole weights."""
    canary: CanarySpec = CanarySpec()
    """Check of newly adopted weights."""


class EvaluationSpec(Block):
    """Evaluation during the run, by a separate process on published weights."""

    every_steps: int = Field(0, ge=0, le=1_000_000)
    """Evaluate at step 0, every N steps and at the end; 0 disables."""
    samples_per_prompt: int = Field(1, ge=1, le=1024)
    """Number of completions per problem (k of mean@k)."""
    pass_k: list[Annotated[int, Field(ge=1, le=1024)]] = Field([1], max_length=16)
    """The values of k for pass@k, each at most samplesPerPrompt."""
    temperature: float = Field(0.6, ge=0, le=100)
    """Sampling temperature, at least 0.01; or 0, which is greedy decoding."""
    top_p: float = Field(0.95, gt=0, le=1)
    """Top-p (nucleus) sampling; 1 disables."""
    top_k: int = Field(0, ge=0, le=1_000_000)
    """Top-k sampling; 0 disables."""
    max_completion_tokens: int | None = Field(None, ge=1, le=1_000_000)
    """Maximum length of a completion; default: that of training."""
    engine: Literal["vllm", "transformers"] = "vllm"
    """Inference engine of the evaluation."""
    batch_prompts: int = Field(64, ge=1, le=65_536)
    """Number of prompts generated together."""
    gpus: int = Field(0, ge=0, le=64)
    """GPUs of the evaluation process."""
    seed: Seed = 0
    """Seed of sampling in the evaluation."""
    pod_template: PodTemplateSpec = PodTemplateSpec()
    """Pod template of the evaluation."""

    def broken_rules(self) -> Iterable[BrokenRule]:
        """pass@k needs k samples; vLLM samples at 0.01 where the temperature is between 0 and that."""
        if 0 < self.temperature < MIN_TEMPERATURE:
            yield (
                "temperature",
                f"is {self.temperature:g}, and vLLM would sample at {MIN_TEMPERATURE:g};"
                f" set 0 for greedy decoding, or at least {MIN_TEMPERATURE:g}",
            )
        largest = max(self.pass_k, default=1)
        if largest > self.samples_per_prompt:
            yield (
                "passK",
                f"holds {largest}, but samplesPerPrompt is {self.samples_per_prompt}; set samplesPerPrompt: {largest}",
            )


class FailurePolicySpec(Block):
    """How often a process may fail before it is given up; preemption is never counted.

    A process that exits with a user error (exit code 2) is never restarted. The run fails once its learner, or every
    sampler, is given up.
    """

    learner_restarts: int = Field(3, ge=0, le=1000)
    """Number of crashes after which the learner is still restarted."""
    sampler_restarts: int = Field(10, ge=0, le=100_000)
    """Number of crashes after which a sampler is still restarted; the run fails once all samplers exceed it."""
    site_restarts: int = Field(20, ge=0, le=100_000)
    """Number of node failures (GPU, disk, mount, memory, clock: exit code 3) after which a process is restarted."""
    refill_steps: int = Field(50, ge=0, le=10_000_000)
    """Give a process one restart back every N training steps; 0 disables."""
    resumes: int = Field(0, ge=0, le=1_000_000)
    """Increase it to resume a failed run in place, with everything on its volume and with full restart budgets."""
    start_over: bool = False
    """Start again at step 0 when there are checkpoints and none can be used; they are moved to quarantine/."""
    min_samplers: int = Field(1, ge=0, le=1024)
    """Number of samplers that must be ready (while available) for the run to be reported as healthy."""


class SecretKeySpec(Block):
    """A key of a Secret in the run's namespace."""

    name: ShortText
    """Name of the Secret."""
    key: ShortText
    """Key in it."""


class CredentialsSpec(Block):
    """References to Secrets on Kubernetes; on one machine the environment's HF_TOKEN and WANDB_API_KEY are used."""

    hub_token: SecretKeySpec | None = None
    """Token of the Hugging Face Hub, for gated models and datasets."""
    wandb_api_key: SecretKeySpec | None = None
    """API key of Weights & Biases."""


class LocalSpec(Block):
    """Options of `heterorl run` on one machine."""

    share_gpus: bool = False
    """Let the learner and samplers share GPUs; lower gpuMemoryUtilization accordingly."""


class RunSpec(Block):
    """Desired state of a run: what to train, how, and with which samplers."""

    mode: Literal["hetero", "online"] = "hetero"
    """hetero: learner and samplers run asynchronously; online: samplers wait for the newest weights, so lag is 0."""
    seed: Seed = 0
    """Added to every other seed, so that one number reproduces or varies the whole run."""
    model: ModelSpec = ModelSpec()
    """The model to train."""
    data: DataSpec = DataSpec()
    """Training and evaluation datasets."""
    rewards: list[RewardSpec] = Field([RewardSpec()], min_length=1, max_length=16)
    """Reward functions; the reward is their weighted sum."""
    algorithm: AlgorithmSpec = AlgorithmSpec()
    """Loss, group size, advantages and staleness."""
    generation: GenerationSpec = GenerationSpec()
    """How completions are sampled."""
    learner: LearnerSpec = LearnerSpec()
    """The learner."""
    samplers: list[SamplerPoolSpec] = Field(min_length=1, max_length=32, json_schema_extra=list_map("name"))
    """Pools of samplers."""
    exchange: ExchangeSpec = ExchangeSpec()
    """The exchange on the shared volume."""
    evaluation: EvaluationSpec = EvaluationSpec()
    """Evaluation during the run."""
    monitoring: MonitoringSpec = MonitoringSpec()
    """Where metrics are written."""
    failure_policy: FailurePolicySpec = FailurePolicySpec()
    """How often processes are restarted."""
    credentials: CredentialsSpec = CredentialsSpec()
    """References to Secrets."""
    local: LocalSpec = LocalSpec()
    """Options of `heterorl run` on one machine."""
    time_scale: float = Field(1.0, gt=0, le=1000)
    """Factor applied to delays and availability given in seconds: 0.01 turns 1800 s into 18 s."""
    suspend: bool = False
    """On Kubernetes: scale all pods to zero and keep the volume."""
    resume: bool = False
    """On Kubernetes: continue from the state on a volume that has already been used."""
    ttl_seconds_after_finished: int | None = Field(None, ge=0, le=31_536_000)
    """On Kubernetes: delete the run this long after it has finished; if not set, it is kept."""
    active_deadline_seconds: int | None = Field(None, ge=1, le=31_536_000)
    """Fail the run if it takes longer than this."""

    @property
    def require_value(self) -> bool | None:
        """What the accuracy reward says of computations as answers; None where that depends on the row."""
        return next((reward.require_value for reward in self.rewards if reward.name == "accuracy"), None)

    def broken_rules(self) -> Iterable[BrokenRule]:
        """Rules that span blocks."""
        yield from duplicates("samplers", [pool.name for pool in self.samplers])
        for pool in self.samplers:
            if pool.lora == "adapter" and not self.model.lora.is_on:
                yield f"samplers.{pool.name}.lora", "is adapter, but model.lora.rank is 0; set that, or lora: merged"
        yield from duplicates("rewards", [reward.path or reward.name for reward in self.rewards])
        verified = any(reward.name == "task" for reward in self.rewards)
        if verified and all(dataset.source != "reasoningGym" for dataset in self.data.train.sets):
            yield (
                "rewards.task",
                "needs problems of reasoning-gym; set data.train.source: reasoningGym, or another reward",
            )
        if self.mode == "hetero" and self.algorithm.staleness.max_steps == 0:
            yield "algorithm.staleness.maxSteps", "is 0, which requires mode: online; set that, or a larger maxSteps"
        if self.mode == "online":
            yield from self._broken_rules_online()
        for pool in self.samplers:
            delay, limit = pool.delay, self.algorithm.staleness.max_steps
            if delay.unit == "steps" and delay.distribution not in ("none", "trace") and delay.lower > limit:
                yield (
                    f"samplers.{pool.name}.delay.lower",
                    (
                        f"is {delay.lower:g} steps, but algorithm.staleness.maxSteps is {limit},"
                        " so every rollout would be too old; raise maxSteps"
                    ),
                )
        if self.mode == "hetero" and 0 < self.algorithm.staleness.max_steps < self.learner.publish.every_steps - 1:
            yield (
                "learner.publish.everySteps",
                (
                    f"is {self.learner.publish.every_steps}, but algorithm.staleness.maxSteps is"
                    f" {self.algorithm.staleness.max_steps}, so rollouts would grow too old between two versions;"
                    " publish more often, or raise maxSteps"
                ),
            )
        if all(pool.replicas == 0 for pool in self.samplers):
            yield "samplers", "have 0 replicas in total, so nothing would be generated; set replicas: 1"
        if self.evaluation.every_steps and not self.data.evals:
            yield "data.evals", "is empty, but evaluation.everySteps is set; add a dataset, or set everySteps: 0"
        yield from self._broken_rules_of_the_best()
        capacity = self.exchange.max_pending_groups * len(self.slots)
        if 0 < capacity < self.learner.batch.groups:
            yield (
                "learner.batch.groups",
                (
                    f"is {self.learner.batch.groups}, but the {len(self.slots)} samplers pause once {capacity} groups"
                    f" are waiting; raise exchange.maxPendingGroups from {self.exchange.max_pending_groups}"
                ),
            )

    def _broken_rules_of_the_best(self) -> Iterable[BrokenRule]:
        checkpoint, every = self.learner.checkpoint, self.evaluation.every_steps
        if checkpoint.keep_best is None:
            return
        if checkpoint.keep_best not in [dataset.label for dataset in self.data.evals]:
            yield (
                "learner.checkpoint.keepBest",
                f"is {checkpoint.keep_best}, which is no label of data.evals; set it to one of theirs",
            )
        if every == 0 or every % checkpoint.every_steps:
            yield (
                "learner.checkpoint.everySteps",
                (
                    f"is {checkpoint.every_steps} and evaluation.everySteps is {every}, but keepBest needs a checkpoint"
                    " of every evaluated step; set evaluation.everySteps to a multiple of checkpoint.everySteps"
                ),
            )

    def _broken_rules_online(self) -> Iterable[BrokenRule]:
        for pool in self.samplers:
            if pool.delay.distribution != "none":
                yield (
                    f"samplers.{pool.name}.delay",
                    "conflicts with mode: online, which waits for the newest weights; remove the delay",
                )
        if self.learner.publish.every_steps != 1:
            yield (
                "learner.publish.everySteps",
                f"is {self.learner.publish.every_steps}, but mode: online requires 1; set everySteps: 1",
            )

    @property
    def max_lag(self) -> int:
        """Maximum lag, in learner steps, of a rollout that is trained on."""
        return 0 if self.mode == "online" else self.algorithm.staleness.max_steps

    @property
    def canary_tolerance(self) -> float:
        """Largest admissible mean absolute difference of the canary's log-probabilities, by data type unless set."""
        default = 1e-4 if self.model.dtype == "float32" else 0.1
        return self.exchange.canary.tolerance or default

    @property
    def slots(self) -> list[Slot]:
        """Every slot in a stable order; the position of a slot determines its shard of the data."""
        return [Slot(pool.name, index) for pool in self.samplers for index in range(pool.replicas)]

    def pool(self, name: str) -> SamplerPoolSpec:
        """The sampler pool of that name."""
        return next(pool for pool in self.samplers if pool.name == name)


class Metadata(Block):
    """The part of Kubernetes' ObjectMeta that a run uses."""

    name: RunName
    """Name of the run, and of its folder under runs/."""
    namespace: ShortText | None = None
    """Namespace on Kubernetes."""
    uid: ShortText | None = None
    """UID that Kubernetes assigned to the run; the operator writes it into the spec that pods read."""
    labels: StringMap = Field({})
    """Labels."""
    annotations: StringMap = Field({})
    """Annotations."""


class HeteroRLRun(Block):
    """A reinforcement learning run with one learner and any number of samplers."""

    api_version: Literal["heterorl.dev/v1alpha1"]
    """Always heterorl.dev/v1alpha1."""
    kind: Literal["HeteroRLRun"]
    """Always HeteroRLRun."""
    metadata: Metadata
    """Name, labels and annotations."""
    spec: RunSpec
    """The run."""

    def resolved(self) -> dict[str, Any]:
        """The manifest with every default written out, ready for JSON."""
        return self.model_dump(mode="json", by_alias=True)
