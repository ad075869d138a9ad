"""The run spec: every field of a `HeteroRLRun`, declared once.

The CRD (`heterorl.spec.crd`), `docs/spec.md` and the command line's help are generated from these classes. Learner,
sampler and operator read the same resolved spec. Fields are `snake_case` here and `camelCase` in YAML; the sentence
under a field is its documentation. Rules that span fields are `broken_rules`; their messages say what to write instead.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import Field

from heterorl.names import Slot
from heterorl.spec.base import (
    Block,
    BrokenRule,
    Path_,
    PoolName,
    Quantity,
    RunName,
    Seed,
    ShortText,
    StringMap,
    Text,
    duplicates,
    list_map,
)
from heterorl.spec.pod_template import PodTemplateSpec

API_VERSION = "heterorl.dev/v1alpha1"
KIND = "HeteroRLRun"

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
    "custom",
]


# ── model and data ───────────────────────────────────────────────────────────────────────────────────────────────────
class TinyModelSpec(Block):
    """A small Qwen3-architecture model with a byte tokenizer, made and briefly supervised during preparation."""

    hidden_size: int = Field(128, ge=32, le=2048, multiple_of=32)
    """Width of the residual stream; heads are 32 wide, so the number of heads is `hiddenSize / 32`."""
    num_layers: int = Field(3, ge=1, le=32)
    """Number of transformer layers."""
    tie_embeddings: bool = True
    """Share the input embedding with the output head, as Qwen3-0.6B to 4B do."""
    target_accuracy: float = Field(0.2, ge=0, le=0.95)
    """Supervise until held-out accuracy, sampled at temperature 1, first passes this share; 0 skips supervision."""
    max_supervised_steps: int = Field(2000, ge=0, le=100_000)
    """Stop supervising after this many steps even if the target was not reached."""
    supervised_learning_rate: float = Field(1e-3, gt=0, le=1)
    """Learning rate of the supervision (AdamW)."""
    seed: Seed = 0
    """Seed of the initial weights and of the order of supervision."""


class ModelSpec(Block):
    """The policy to train."""

    source: Literal["path", "hub", "tiny"] = "tiny"
    """Where the starting weights come from: a folder, the Hugging Face Hub, or a small model made on the spot."""
    path: Path_ | None = None
    """Folder with config, tokenizer and safetensors (`source: path`); another run's output or checkpoint will do."""
    name: ShortText | None = None
    """Name of the model on the Hub, as `Qwen/Qwen3-1.7B` (`source: hub`)."""
    revision: ShortText | None = None
    """Branch, tag or commit on the Hub; pin it, so that a later run starts from the same weights."""
    tiny: TinyModelSpec = TinyModelSpec()
    """Shape and supervision of the small model (`source: tiny`)."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Data type of training, of published weights and of generation."""
    attn_implementation: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    """Attention kernel of the learner; auto takes flash_attention_2 where it is installed, otherwise sdpa."""

    def broken_rules(self) -> Iterable[BrokenRule]:
        """A source needs its field."""
        if self.source == "path" and not self.path:
            yield "path", "is needed by source: path; write the model's folder"
        if self.source == "hub" and not self.name:
            yield "name", "is needed by source: hub; write a name as Qwen/Qwen3-1.7B"


class ColumnsSpec(Block):
    """Which column holds what. Where a default is absent, question stands in for problem and solution for answer."""

    prompt: ShortText = "problem"
    """Column with the problem's text."""
    answer: ShortText = "answer"
    """Column with the reference answer."""
    answer_pattern: ShortText | None = None
    """Its first group is the answer, as in `#### (.+)` for GSM8K; absent: the column's last box, or else all of it."""
    strip_suffix: Text | None = None
    """Text removed from the end of a problem, for files that already end with an instruction."""


class ArithmeticSpec(Block):
    """Built-in sums `a+b=`: endless, checkable, learnable by a tiny model."""

    digits: int = Field(2, ge=1, le=6)
    """Digits of each operand."""
    rows: int = Field(4096, ge=1, le=1_000_000)
    """How many problems to draw (with replacement when there are fewer distinct ones)."""
    seed: Seed = 0
    """Seed of the problems."""


class DatasetSpec(Block):
    """One data set: a JSONL or Parquet file, a data set of the Hub, or built-in arithmetic."""

    source: Literal["file", "hub", "arithmetic"] = "arithmetic"
    """Where the rows come from."""
    path: Path_ | None = None
    """A .jsonl or .parquet file (`source: file`), relative to the manifest's folder; on Kubernetes, to the volume."""
    name: ShortText | None = None
    """Name of the data set on the Hub (`source: hub`)."""
    config: ShortText | None = None
    """Configuration of the Hub data set, as `main`."""
    revision: ShortText | None = None
    """Branch, tag or commit on the Hub."""
    split: ShortText = "train"
    """Split of the Hub data set."""
    arithmetic: ArithmeticSpec = ArithmeticSpec()
    """The built-in problems (`source: arithmetic`)."""
    columns: ColumnsSpec = ColumnsSpec()
    """Column names."""
    limit: int | None = Field(None, ge=1)
    """Use only the first so many rows."""

    def broken_rules(self) -> Iterable[BrokenRule]:
        """A source needs its field."""
        if self.source == "file" and not self.path:
            yield "path", "is needed by source: file; write the name of a .jsonl or .parquet file"
        if self.source == "hub" and not self.name:
            yield "name", "is needed by source: hub; write a name as openai/gsm8k"


class EvalDatasetSpec(DatasetSpec):
    """A data set to evaluate on."""

    label: PoolName
    """Short label of this set in metrics and tables, as `math500`."""


class DataSpec(Block):
    """What to train and evaluate on."""

    train: DatasetSpec = DatasetSpec()
    """Problems the samplers draw prompts from."""
    evals: list[EvalDatasetSpec] = Field([], max_length=16, json_schema_extra=list_map("label"))
    """Problems for evaluation."""
    prompt_template: Literal["think", "noThink", "raw"] = "raw"
    """think: reason first, answer in a box; noThink: answer in a box at once; raw: the problem's text alone."""
    shuffle_seed: Seed = 0
    """Seed of the order of prompts; every slot walks its own share of that order."""

    def broken_rules(self) -> Iterable[BrokenRule]:
        """Labels differ."""
        yield from duplicates("evals", [dataset.label for dataset in self.evals])


# ── rewards and algorithm ────────────────────────────────────────────────────────────────────────────────────────────
class RewardSpec(Block):
    """One reward function and its weight in the sum."""

    name: RewardName = "accuracy"
    """accuracy, format, tag_count, length, cosine, repetition, language, reasoning_steps, boxed, or custom."""
    weight: float = Field(1.0, ge=-1000, le=1000)
    """Factor of this reward in the sum."""
    path: ShortText | None = None
    """Dotted path of a function `(completions, **columns) -> list[float]` (`name: custom`)."""
    max_length: int = Field(1024, ge=1, le=1_000_000)
    """length, cosine: completion length in tokens at which the reward reaches its end value."""
    ngram_size: int = Field(3, ge=1, le=64)
    """repetition: length of the repeated word sequences that are penalised."""
    max_penalty: float = Field(-1.0, ge=-1000, le=0)
    """repetition: value when every n-gram repeats."""
    language: Literal["en", "zh"] = "en"
    """language: script that the completion should keep to."""
    time_limit_seconds: float = Field(2.0, gt=0, le=60)
    """accuracy: an answer whose comparison takes longer counts as wrong."""

    def broken_rules(self) -> Iterable[BrokenRule]:
        """A path belongs to a custom reward."""
        if self.name == "custom" and not self.path:
            yield "path", "is needed by name: custom; write package.module.function"
        if self.name != "custom" and self.path:
            yield "path", f"goes with name: custom only; remove it, or write name: custom instead of {self.name}"


class RatioClipSpec(Block):
    """Bounds of an importance ratio: it is held within [1 - low, 1 + high]."""

    low: float = Field(0.2, ge=0, le=1)
    """How far the ratio may fall below 1."""
    high: float = Field(0.2, ge=0, le=1000)
    """How far the ratio may rise above 1."""
    delta: float | None = Field(None, gt=1, le=1000)
    """Two-sided clipping: upper bound of the ratio before the minimum is taken, so that A < 0 is bounded too."""


class DrGrpoSpec(RatioClipSpec):
    """Dr.GRPO (arXiv 2503.20783)."""


class DeltaLSpec(RatioClipSpec):
    """ΔL Normalization (arXiv 2509.07558)."""

    alpha: float = Field(0.75, ge=0, le=1)
    """Exponent of the completion length in a sequence's weight; 0 is Dr.GRPO's constant, 1 least variance."""


class GepoPlusSpec(RatioClipSpec):
    """GEPO with GSPO's denominator near the sampler's policy."""

    kl_threshold: float = Field(0.002, ge=0, le=100)
    """Below this KL between learner and sampler a sequence uses GSPO's denominator."""


class GmpoSpec(Block):
    """GMPO (arXiv 2507.20673): bounds of a token's log ratio."""

    low: float = Field(0.4, ge=0, le=100)
    """Lowest log ratio is -low."""
    high: float = Field(0.4, ge=0, le=100)
    """Highest log ratio."""


class CispoSpec(Block):
    """CISPO (arXiv 2506.13585): an absolute cap of the detached token ratio."""

    cap: float = Field(5.0, gt=0, le=1000)
    """Largest weight of a token."""


class ToprSpec(Block):
    """TOPR (arXiv 2503.14286): whole-trajectory ratio, clamped for negative advantages."""

    cap: float = Field(1.0, gt=0, le=1000)
    """Largest weight of a trajectory with a negative advantage."""


class ImpalaSpec(Block):
    """IMPALA's V-trace weight (arXiv 1802.01561), without a value function."""

    rho_bar: float = Field(1.0, gt=0, le=1000)
    """Largest weight of a token."""


class LossSpec(Block):
    """The policy loss: a type and that type's own parameters."""

    type: LossType = "gepo"
    """Which loss to train with."""
    grpo: RatioClipSpec = RatioClipSpec()
    """GRPO (arXiv 2402.03300): token ratio, mean over each sequence."""
    bnpo: RatioClipSpec = RatioClipSpec()
    """BNPO (arXiv 2506.02864): Beta-normalised advantages, mean over all tokens."""
    dr_grpo: DrGrpoSpec = Field(DrGrpoSpec(), alias="dr_grpo")
    """Dr.GRPO: token ratio, divided by a constant length."""
    dapo: RatioClipSpec = RatioClipSpec()
    """DAPO (arXiv 2503.14476): token ratio, mean over all tokens of the step."""
    gspo: RatioClipSpec = RatioClipSpec()
    """GSPO (arXiv 2507.18071): one ratio a sequence."""
    delta_l: DeltaLSpec = Field(DeltaLSpec(), alias="delta_l")
    """ΔL Normalization: sequences weighted by a power of their length."""
    gepo: RatioClipSpec = RatioClipSpec()
    """GEPO (arXiv 2508.17850): one ratio a sequence, against the expectation over its prompt's group."""
    gepo_plus: GepoPlusSpec = Field(GepoPlusSpec(), alias="gepo_plus")
    """GEPO that falls back to GSPO's denominator close to the sampler's policy."""
    eqp: RatioClipSpec = RatioClipSpec()
    """GEPO with E_q[p] as denominator: needs whole groups in a micro-batch."""
    gmpo: GmpoSpec = GmpoSpec()
    """GMPO: geometric mean of clipped token ratios."""
    cispo: CispoSpec = CispoSpec()
    """CISPO: detached, capped token weights."""
    topr: ToprSpec = ToprSpec()
    """TOPR: detached trajectory weights, one-sided."""
    impala: ImpalaSpec = ImpalaSpec()
    """IMPALA: detached, truncated token weights."""


class AdvantageSpec(Block):
    """How rewards become advantages."""

    scale: Literal["auto", "none", "group", "batch", "beta"] = "auto"
    """auto: the authors' choice for the loss; none: reward - group mean; group, batch: over that std; beta: BNPO's."""


class KlToSamplerSpec(Block):
    """CPPO-KL: a penalty that keeps the learner near the policy that generated the data (k3 estimator)."""

    weight: float = Field(0.0, ge=0, le=100)
    """Factor of the penalty; the authors use 0.005."""


class StalenessSpec(Block):
    """How old a rollout may be when it is trained."""

    max_steps: int = Field(64, ge=0, le=100_000)
    """Largest admissible lag: learner step minus the step of the weights that generated it."""
    policy: Literal["drop", "wait"] = "drop"
    """drop: too old rollouts are dropped and counted; wait: samplers pause before they would produce such."""


class AlgorithmSpec(Block):
    """Loss, groups and staleness."""

    loss: LossSpec = LossSpec()
    """Policy loss."""
    group_size: int = Field(8, ge=1, le=1024)
    """Completions generated for each prompt."""
    advantage: AdvantageSpec = AdvantageSpec()
    """Advantages from rewards."""
    kl_to_sampler: KlToSamplerSpec = KlToSamplerSpec()
    """Penalty on the distance to the sampler's policy."""
    staleness: StalenessSpec = StalenessSpec()
    """Admission of old rollouts."""
    mask_truncated: bool = False
    """Leave completions that hit the length limit out of the loss."""

    def broken_rules(self) -> Iterable[BrokenRule]:
        """Advantages compare the completions of a group."""
        if self.group_size == 1:
            yield "groupSize", "is 1, but advantages are relative to the group's mean; write at least 2"


class GenerationSpec(Block):
    """Sampling of completions."""

    temperature: float = Field(1.0, gt=0, le=100)
    """Softmax temperature; the learner's log-probabilities use the same."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Nucleus sampling; below 1 the behaviour law is truncated and ratios are biased (a warning says so)."""
    top_k: int = Field(0, ge=0, le=1_000_000)
    """Sample among so many likeliest tokens; 0 is off. On, ratios are biased as with topP."""
    min_p: float = Field(0.0, ge=0, lt=1)
    """Drop tokens less likely than this share of the likeliest; 0 is off."""
    repetition_penalty: float = Field(1.0, gt=0, le=10)
    """Divide the logits of tokens already seen; 1 is off."""
    max_prompt_tokens: int = Field(768, ge=1, le=1_000_000)
    """Longer prompts are counted and skipped."""
    max_completion_tokens: int = Field(1024, ge=1, le=1_000_000)
    """A completion is cut here and marked as truncated."""
    seed: Seed = 0
    """Seed of sampling; every slot derives its own."""

    @property
    def truncated_law(self) -> bool:
        """Whether sampling is from something else than the model's softmax, so that ratios are biased."""
        return self.top_p < 1 or self.top_k > 0 or self.min_p > 0 or self.repetition_penalty != 1


# ── learner ──────────────────────────────────────────────────────────────────────────────────────────────────────────
class LearnerBatchSpec(Block):
    """What one optimizer step trains on."""

    groups: int = Field(32, ge=1, le=65_536)
    """Prompt groups in an optimizer step; each brings groupSize completions."""
    tokens_per_micro_batch: int = Field(8192, ge=1, le=10_000_000)
    """Token budget of one forward and backward pass; a longer sequence goes alone."""


class OptimizerSpec(Block):
    """AdamW."""

    learning_rate: float = Field(1e-6, gt=0, le=1)
    """Peak learning rate."""
    betas: list[Annotated[float, Field(ge=0, lt=1)]] = Field([0.9, 0.999], min_length=2, max_length=2)
    """Decay of the first and second moments."""
    eps: float = Field(1e-8, gt=0, le=1)
    """Term added to the denominator."""
    weight_decay: float = Field(0.0, ge=0, le=10)
    """Decoupled weight decay."""
    max_grad_norm: float = Field(1.0, gt=0, le=1_000_000)
    """Gradients are scaled down to this norm."""


class ScheduleSpec(Block):
    """The learning rate over the run."""

    type: Literal["constant", "cosine", "linear"] = "constant"
    """Shape after the warm-up."""
    warmup_ratio: float = Field(0.03, ge=0, lt=1)
    """Share of the steps in which the rate rises linearly from 0."""


class PublishSpec(Block):
    """When weights are published."""

    every_steps: int = Field(1, ge=1, le=100_000)
    """Publish after every so many optimizer steps."""


class CheckpointSpec(Block):
    """When the learner's whole state is saved."""

    every_steps: int = Field(50, ge=1, le=1_000_000)
    """Save after every so many optimizer steps; a restart repeats at most these."""
    keep: int = Field(2, ge=1, le=1000)
    """Newest checkpoints kept."""


class LogCompletionsSpec(Block):
    """A look at what the model writes."""

    every_steps: int = Field(0, ge=0, le=1_000_000)
    """Write a few completions to `completions.jsonl` every so many steps; 0 is off."""
    count: int = Field(4, ge=1, le=1024)
    """How many a time."""


class WandbSpec(Block):
    """Weights & Biases; needs the wandb package and its API key in the environment."""

    project: ShortText | None = None
    """Project; absent is off."""
    name: ShortText | None = None
    """Name of the run there; absent: this run's name."""
    mode: Literal["online", "offline"] = "online"
    """offline writes to the run's folder, to be synced later."""
    id: ShortText | None = None
    """Fixed id, so that a resumed run goes on in the same place; absent: derived from the run's name."""


class MonitoringSpec(Block):
    """Where metrics go besides JSONL."""

    prometheus_port: int = Field(0, ge=0, le=65_535)
    """Port of /metrics on each process; 0 takes any free one and notes it in the run's folder."""
    tensorboard: bool = True
    """Write TensorBoard event files."""
    wandb: WandbSpec = WandbSpec()
    """Weights & Biases."""
    log_completions: LogCompletionsSpec = LogCompletionsSpec()
    """Samples of completions."""


class LearnerSpec(Block):
    """The one process (or set of ranks) that trains."""

    steps: int = Field(1000, ge=1, le=10_000_000)
    """Optimizer steps of the run."""
    batch: LearnerBatchSpec = LearnerBatchSpec()
    """Size of a step."""
    optimizer: OptimizerSpec = OptimizerSpec()
    """AdamW's parameters."""
    schedule: ScheduleSpec = ScheduleSpec()
    """Learning rate schedule."""
    strategy: Literal["torch", "zero1", "zero2", "zero3"] = "torch"
    """torch: plain PyTorch (DDP with several processes); zero1 to zero3: DeepSpeed."""
    replicas: int = Field(1, ge=1, le=256)
    """Pods of the learner (on one machine: nodes are emulated as processes)."""
    processes_per_replica: int = Field(1, ge=1, le=64)
    """Ranks in each replica; with GPUs one for each, so the same number as gpus."""
    gpus: int = Field(0, ge=0, le=64)
    """GPUs of each replica; 0 trains on the CPU."""
    threads: int = Field(0, ge=0, le=1024)
    """CPU threads of each rank; 0 shares the machine's cores out evenly."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass to save memory."""
    publish: PublishSpec = PublishSpec()
    """Publication of weights."""
    checkpoint: CheckpointSpec = CheckpointSpec()
    """Checkpoints."""
    stall_seconds: float = Field(1800.0, gt=0, le=1_000_000)
    """Warn when no admissible rollouts came for so long."""
    finish_grace_seconds: float = Field(300.0, ge=0, le=86_400)
    """On Kubernetes: how long the finished learner idles so that its log can still be read."""
    seed: Seed = 0
    """Seed of the learner's own random choices."""
    pod_template: PodTemplateSpec = PodTemplateSpec()
    """Pods of the learner, and of the preparation."""

    def broken_rules(self) -> Iterable[BrokenRule]:
        """One rank drives one GPU."""
        if self.gpus and self.processes_per_replica != self.gpus:
            yield (
                "processesPerReplica",
                (
                    f"is {self.processes_per_replica}, but gpus is {self.gpus} and a rank drives one;"
                    f" write processesPerReplica: {self.gpus}"
                ),
            )

    @property
    def world_size(self) -> int:
        """Ranks in all."""
        return self.replicas * self.processes_per_replica


# ── samplers ─────────────────────────────────────────────────────────────────────────────────────────────────────────
class DelayTraceSpec(Block):
    """Recorded delays, replayed in order and from the start again."""

    path: Path_ | None = None
    """CSV file, relative to the manifest's folder; on Kubernetes, to the volume."""
    column: ShortText | None = None
    """Column with the delays."""
    values: list[Annotated[float, Field(ge=0)]] = Field([], max_length=4096)
    """Delays written out, instead of a file."""


class DelaySpec(Block):
    """When a sampler may adopt new weights. Draws are clamped to [lower, upper]."""

    distribution: Literal["none", "constant", "lognormal", "weibull", "exponential", "trace"] = "none"
    """Law of the delay."""
    model: Literal["hold", "transit"] = "hold"
    """hold: adopt the newest once the delay has passed since the last swap; transit: see a version a delay after it."""
    unit: Literal["seconds", "steps"] = "seconds"
    """Seconds, or learner steps counted by the newest published version."""
    lower: float = Field(60.0, ge=0, le=1_000_000)
    """Lower quantile of the law and least delay, in the unit; the delay itself when constant."""
    upper: float = Field(1920.0, ge=0, le=1_000_000)
    """Upper quantile of the law and greatest delay, in the unit."""
    confidence: float = Field(0.995, gt=0.5, lt=1)
    """Probability below the upper quantile, and above the lower one."""
    subtract: float = Field(0.0, ge=0, le=1_000_000)
    """Subtracted from each draw before clamping: time the real system already takes (400 in the paper's 1L2S)."""
    trace: DelayTraceSpec = DelayTraceSpec()
    """The recorded delays (`distribution: trace`)."""
    seed: Seed = 0
    """Seed of the draws; every slot derives its own."""

    def broken_rules(self) -> Iterable[BrokenRule]:
        """The law's bounds make sense; a trace is there."""
        if self.distribution in ("lognormal", "weibull", "exponential") and self.lower >= self.upper:
            yield (
                "lower",
                (
                    f"is {self.lower:g} and must be below upper, which is {self.upper:g};"
                    " for a fixed delay write distribution: constant"
                ),
            )
        if self.distribution in ("lognormal", "weibull") and self.lower <= 0:
            yield "lower", f"is {self.lower:g} and must be above 0 for a {self.distribution} law"
        if self.distribution == "trace" and bool(self.trace.path) == bool(self.trace.values):
            yield "trace", "needs either path (a CSV file, with column) or values"
        if self.trace.path and not self.trace.column:
            yield "trace.column", "is needed by trace.path: the file may hold several runs"


class WindowSpec(Block):
    """A span of the run, in seconds since its start."""

    start_seconds: float = Field(ge=0)
    """Start of the span."""
    end_seconds: float = Field(gt=0)
    """End of the span (exclusive)."""
    replicas: int = Field(ge=0, le=1024)
    """Replicas during the span."""

    def broken_rules(self) -> Iterable[BrokenRule]:
        """It ends after it starts."""
        if self.start_seconds >= self.end_seconds:
            yield "startSeconds", f"is {self.start_seconds:g} and must be below endSeconds, {self.end_seconds:g}"


class ChurnSpec(Block):
    """Each replica goes up and down on its own, with exponential times."""

    mean_up_seconds: float = Field(600.0, gt=0, le=10_000_000)
    """Mean time a replica stays up."""
    mean_down_seconds: float = Field(120.0, gt=0, le=10_000_000)
    """Mean time it stays away."""
    seed: Seed = 0
    """Seed of the times; every replica derives its own."""


class AvailabilityPointSpec(Block):
    """From this moment on, so many replicas."""

    at_seconds: float = Field(ge=0)
    """Seconds since the run's start."""
    replicas: int = Field(ge=0, le=1024)
    """Replicas from then on."""


class AvailabilitySpec(Block):
    """How many of a pool's replicas exist at a moment of the run; never more than `replicas`."""

    type: Literal["always", "windows", "churn", "trace"] = "always"
    """Kind of availability."""
    windows: list[WindowSpec] = Field([], max_length=64)
    """Spans with their replicas: the largest that holds a moment counts; outside them the pool has none."""
    churn: ChurnSpec = ChurnSpec()
    """Random coming and going."""
    trace: list[AvailabilityPointSpec] = Field([], max_length=1024, json_schema_extra=list_map("atSeconds"))
    """Replicas over time as steps; before the first point all replicas are there."""

    def broken_rules(self) -> Iterable[BrokenRule]:
        """A type needs its field; times rise."""
        if self.type == "windows" and not self.windows:
            yield "windows", "is empty, but type is windows; write at least one, or type: always"
        if self.type == "trace" and not self.trace:
            yield "trace", "is empty, but type is trace; write at least one point, or type: always"
        times = [point.at_seconds for point in self.trace]
        if times != sorted(set(times)):
            yield "trace", "is out of order; atSeconds must rise from point to point"


class SamplerPoolSpec(Block):
    """Samplers that are alike: same engine, delay law and place."""

    name: PoolName
    """Name of the pool."""
    replicas: int = Field(1, ge=0, le=1024)
    """Samplers in the pool."""
    engine: Literal["vllm", "transformers"] = "vllm"
    """vllm for real models (GPU or CPU); transformers for tiny ones and for parity tests."""
    prompts_per_batch: int = Field(8, ge=1, le=65_536)
    """Prompts generated together; weights are swapped between batches."""
    delay: DelaySpec = DelaySpec()
    """When new weights may be adopted."""
    availability: AvailabilitySpec = AvailabilitySpec()
    """When replicas exist."""
    gpus: int = Field(0, ge=0, le=64)
    """GPUs of each replica; 0 generates on the CPU."""
    tensor_parallel: int = Field(1, ge=1, le=64)
    """GPUs that hold one model together (vLLM)."""
    gpu_memory_utilization: float = Field(0.9, gt=0, le=1)
    """Share of a GPU's memory that vLLM takes."""
    kv_cache_bytes: int = Field(268_435_456, ge=1_048_576)
    """Memory of vLLM's KV cache on a CPU."""
    threads: int = Field(0, ge=0, le=1024)
    """CPU threads of each replica; 0 shares the machine's cores out evenly."""
    pod_template: PodTemplateSpec = PodTemplateSpec()
    """Pods of the pool."""

    def broken_rules(self) -> Iterable[BrokenRule]:
        """A model that is split needs its devices."""
        if self.gpus and self.tensor_parallel > self.gpus:
            yield (
                "tensorParallel",
                f"is {self.tensor_parallel}, but gpus is {self.gpus}; write gpus: {self.tensor_parallel}",
            )


# ── exchange, evaluation, life cycle ─────────────────────────────────────────────────────────────────────────────────
class VolumeSpec(Block):
    """The shared volume on Kubernetes: an existing claim, or one the operator makes."""

    claim_name: ShortText | None = None
    """Use this PersistentVolumeClaim."""
    size: Quantity = "100Gi"
    """Size of a new claim; it may grow, never shrink."""
    storage_class_name: ShortText | None = None
    """Storage class of a new claim."""
    access_modes: list[Literal["ReadWriteMany", "ReadWriteOnce"]] = Field(["ReadWriteMany"], min_length=1, max_length=2)
    """Access modes of a new claim; ReadWriteOnce keeps all pods on one node."""


class RetentionSpec(Block):
    """What is kept on the volume."""

    weights: int = Field(3, ge=2, le=10_000)
    """Newest published versions kept; those a transit delay still needs are kept as well."""
    keep_rollouts: bool = False
    """Keep trained rollouts, to replay them through another loss."""
    volume: Literal["Retain", "Delete"] = "Retain"
    """What happens to a claim the operator made when the run is deleted."""


class CanarySpec(Block):
    """The check that a sampler computes what the learner computes."""

    tolerance: float | None = Field(None, gt=0, le=100)
    """Largest difference of a token's log-probability; absent: 1e-4 in float32, 0.15 in bfloat16."""


class ExchangeSpec(Block):
    """The shared volume and its limits."""

    volume: VolumeSpec = VolumeSpec()
    """The volume on Kubernetes."""
    retention: RetentionSpec = RetentionSpec()
    """What is kept."""
    max_pending_groups: int = Field(64, ge=1, le=1_000_000)
    """A sampler pauses while so many of its own groups wait to be trained."""
    poll_seconds: float = Field(0.5, gt=0, le=3600)
    """How often a waiting side looks at the volume."""
    lease_seconds: float = Field(60.0, gt=0, le=86_400)
    """A slot whose heartbeat stands still for so long may be taken over."""
    canary: CanarySpec = CanarySpec()
    """Check of adopted weights."""


class EvaluationSpec(Block):
    """Evaluation during the run, by a process of its own on published checkpoints."""

    every_steps: int = Field(0, ge=0, le=1_000_000)
    """Evaluate at step 0, every so many steps and at the end; 0 is off."""
    samples_per_prompt: int = Field(1, ge=1, le=1024)
    """Completions for each problem (k of mean@k)."""
    pass_k: list[Annotated[int, Field(ge=1, le=1024)]] = Field([1], max_length=16)
    """The k of pass@k; each at most samplesPerPrompt."""
    temperature: float = Field(0.6, ge=0, le=100)
    """Temperature; 0 is greedy."""
    top_p: float = Field(0.95, gt=0, le=1)
    """Nucleus sampling."""
    top_k: int = Field(0, ge=0, le=1_000_000)
    """Sample among so many likeliest tokens; 0 is off."""
    max_completion_tokens: int | None = Field(None, ge=1, le=1_000_000)
    """Length limit; absent: the training limit."""
    engine: Literal["vllm", "transformers"] = "vllm"
    """Engine of the evaluation."""
    batch_prompts: int = Field(64, ge=1, le=65_536)
    """Prompts generated together."""
    gpus: int = Field(0, ge=0, le=64)
    """GPUs of the evaluation process."""
    seed: Seed = 0
    """Seed of sampling."""
    pod_template: PodTemplateSpec = PodTemplateSpec()
    """Pods of the evaluation."""

    def broken_rules(self) -> Iterable[BrokenRule]:
        """pass@k needs k samples."""
        largest = max(self.pass_k, default=1)
        if largest > self.samples_per_prompt:
            yield "passK", f"asks for k = {largest}, but samplesPerPrompt is {self.samples_per_prompt}; raise that"


class FailurePolicySpec(Block):
    """How often a role may crash before the run fails; preemption is never charged."""

    learner_restarts: int = Field(3, ge=0, le=1000)
    """Crashes of the learner that are restarted."""
    sampler_restarts: int = Field(10, ge=0, le=100_000)
    """How often each sampler may crash; once all of them have crashed more often, the run fails."""
    min_samplers: int = Field(1, ge=0, le=1024)
    """Samplers that must be alive (when available) for the run to count as healthy."""


class SecretKeySpec(Block):
    """A key of a Secret in the run's namespace."""

    name: ShortText
    """Name of the Secret."""
    key: ShortText
    """Key in it."""


class CredentialsSpec(Block):
    """Secrets on Kubernetes, by reference; on one machine HF_TOKEN and WANDB_API_KEY of the environment are used."""

    hub_token: SecretKeySpec | None = None
    """Token of the Hugging Face Hub, for gated models and data."""
    wandb_api_key: SecretKeySpec | None = None
    """API key of Weights & Biases."""


class LocalSpec(Block):
    """Only for `heterorl run` on one machine."""

    share_gpus: bool = False
    """Let learner and samplers share devices; mind gpuMemoryUtilization."""


class RunSpec(Block):
    """What to train, how, and where the samplers are."""

    mode: Literal["hetero", "online"] = "hetero"
    """hetero: everyone at their own pace; online: samplers wait for the newest weights, lag is 0."""
    seed: Seed = 0
    """Added to every other seed, so that one number repeats or varies a whole run."""
    model: ModelSpec = ModelSpec()
    """The policy."""
    data: DataSpec = DataSpec()
    """Training and evaluation data."""
    rewards: list[RewardSpec] = Field([RewardSpec()], min_length=1, max_length=16)
    """Reward functions, summed by weight."""
    algorithm: AlgorithmSpec = AlgorithmSpec()
    """Loss, groups, staleness."""
    generation: GenerationSpec = GenerationSpec()
    """Sampling."""
    learner: LearnerSpec = LearnerSpec()
    """The learner."""
    samplers: list[SamplerPoolSpec] = Field(min_length=1, max_length=32, json_schema_extra=list_map("name"))
    """Pools of samplers."""
    exchange: ExchangeSpec = ExchangeSpec()
    """The shared volume."""
    evaluation: EvaluationSpec = EvaluationSpec()
    """Evaluation during the run."""
    monitoring: MonitoringSpec = MonitoringSpec()
    """Metrics."""
    failure_policy: FailurePolicySpec = FailurePolicySpec()
    """Restart budgets."""
    credentials: CredentialsSpec = CredentialsSpec()
    """Secrets."""
    local: LocalSpec = LocalSpec()
    """One-machine runs."""
    time_scale: float = Field(1.0, gt=0, le=1000)
    """Factor on delays and availability in seconds: 0.01 rehearses 1800 s in 18 s."""
    suspend: bool = False
    """On Kubernetes: scale everything to zero and keep the volume."""
    resume: bool = False
    """On Kubernetes: go on from what an already used volume holds."""
    ttl_seconds_after_finished: int | None = Field(None, ge=0, le=31_536_000)
    """On Kubernetes: delete the finished run after so long; absent keeps it."""
    active_deadline_seconds: int | None = Field(None, ge=1, le=31_536_000)
    """Fail the run when it takes longer."""

    def broken_rules(self) -> Iterable[BrokenRule]:
        """Rules that span blocks."""
        yield from duplicates("samplers", [pool.name for pool in self.samplers])
        yield from duplicates("rewards", [reward.path or reward.name for reward in self.rewards])
        if self.mode == "hetero" and self.algorithm.staleness.max_steps == 0:
            yield "algorithm.staleness.maxSteps", "is 0, which only mode: online can keep; write that, or a larger lag"
        if self.mode == "online":
            yield from self._broken_rules_online()
        for pool in self.samplers:
            delay, limit = pool.delay, self.algorithm.staleness.max_steps
            if delay.unit == "steps" and delay.distribution not in ("none", "trace") and delay.lower > limit:
                yield (
                    f"samplers.{pool.name}.delay.lower",
                    (
                        f"is {delay.lower:g} steps, but algorithm.staleness.maxSteps is {limit},"
                        " so every rollout would be refused; raise maxSteps"
                    ),
                )
        if self.mode == "hetero" and 0 < self.algorithm.staleness.max_steps < self.learner.publish.every_steps - 1:
            yield (
                "learner.publish.everySteps",
                (
                    f"is {self.learner.publish.every_steps}, but algorithm.staleness.maxSteps is"
                    f" {self.algorithm.staleness.max_steps}: between two versions every rollout would grow too old"
                ),
            )
        if all(pool.replicas == 0 for pool in self.samplers):
            yield "samplers", "have 0 replicas in all, so nothing would be generated; write replicas: 1"
        if self.evaluation.every_steps and not self.data.evals:
            yield "data.evals", "is empty, but evaluation.everySteps is set; name a data set, or write everySteps: 0"
        capacity = self.exchange.max_pending_groups * len(self.slots)
        if 0 < capacity < self.learner.batch.groups:
            yield (
                "learner.batch.groups",
                (
                    f"is {self.learner.batch.groups}, but {len(self.slots)} replicas pause once {capacity} groups wait;"
                    f" raise exchange.maxPendingGroups from {self.exchange.max_pending_groups}"
                ),
            )

    def _broken_rules_online(self) -> Iterable[BrokenRule]:
        for pool in self.samplers:
            if pool.delay.distribution != "none":
                yield f"samplers.{pool.name}.delay", "contradicts mode: online, which waits for the newest; remove it"
        if self.learner.publish.every_steps != 1:
            yield "learner.publish.everySteps", f"is {self.learner.publish.every_steps}, but mode: online needs 1"

    @property
    def max_lag(self) -> int:
        """Largest lag, in learner steps, of a rollout that may be trained."""
        return 0 if self.mode == "online" else self.algorithm.staleness.max_steps

    @property
    def canary_tolerance(self) -> float:
        """Largest admissible |difference| of a canary token's log-probability, by data type unless set."""
        default = 1e-4 if self.model.dtype == "float32" else 0.15
        return self.exchange.canary.tolerance or default

    @property
    def slots(self) -> list[Slot]:
        """Every slot in a stable order; a slot's place in it is its share of the data."""
        return [Slot(pool.name, index) for pool in self.samplers for index in range(pool.replicas)]

    def pool(self, name: str) -> SamplerPoolSpec:
        """The sampler pool of that name."""
        return next(pool for pool in self.samplers if pool.name == name)


class Metadata(Block):
    """Kubernetes' metadata, as far as a run needs it."""

    name: RunName
    """Name of the run; also its folder under runs/."""
    namespace: ShortText | None = None
    """Namespace on Kubernetes."""
    uid: ShortText | None = None
    """The uid that Kubernetes gave to the run; the operator writes it into the spec that pods read."""
    labels: StringMap = Field({})
    """Labels."""
    annotations: StringMap = Field({})
    """Annotations."""


class HeteroRLRun(Block):
    """A reinforcement learning run with one learner and many samplers."""

    api_version: Literal["heterorl.dev/v1alpha1"]
    """Always heterorl.dev/v1alpha1."""
    kind: Literal["HeteroRLRun"]
    """Always HeteroRLRun."""
    metadata: Metadata
    """Name and labels."""
    spec: RunSpec
    """The run."""

    def resolved(self) -> dict[str, Any]:
        """The manifest with every default written out, ready for JSON."""
        return self.model_dump(mode="json", by_alias=True)
