"""The CustomResourceDefinition, made from `heterorl.spec.run` and `heterorl.spec.status`.

Kubernetes uses a subset of OpenAPI (a "structural" schema): no references, no titles, exclusive bounds as booleans.
Null is never a value: the API server drops it. Rules across fields are CEL: RULES repeats what `broken_rules` check,
and the rules on changes follow from the table of what may change when (`heterorl.spec.mutability`).
"""

from __future__ import annotations

from typing import Any

import yaml
from pydantic import BaseModel

from heterorl.spec.base import RUN_NAME, Block, block_in
from heterorl.spec.mutability import IMMUTABLE, LIVE, within
from heterorl.spec.pod_template import RESERVED
from heterorl.spec.run import API_VERSION, KIND, MIN_TEMPERATURE, HeteroRLRun, RunSpec, SamplerPoolSpec
from heterorl.spec.status import RunStatus

GROUP, VERSION = API_VERSION.split("/")
PLURAL = "heterorlruns"

Rule = tuple[str, str]

_DATASET_RULES: list[Rule] = [
    (
        "self.source != 'file' || has(self.path) || size(self.paths) > 0",
        "path is required with source: file; set it to a .jsonl, .json, .csv or .parquet file",
    ),
    (
        "!has(self.path) || size(self.paths) == 0",
        "paths is given beside path; move the path into the list, or remove one of them",
    ),
    (
        "self.source != 'hub' || has(self.name)",
        "name is required with source: hub; set it to a name such as openai/gsm8k",
    ),
    (
        "self.source != 'reasoningGym' || size(self.reasoningGym.tasks) > 0",
        "source reasoningGym needs at least one of reasoningGym.tasks",
    ),
]
RULES: dict[str, list[Rule]] = {
    "LoraSpec": [
        (
            "self.rank > 0 || (size(self.targetModules) == 0 && self.output == 'merged')",
            "rank is 0, so there are no adapters; set it to at least 1, or remove targetModules and output",
        ),
    ],
    "ModelSpec": [
        ("self.source != 'path' || has(self.path)", "path is required with source: path; set it to the model's folder"),
        (
            "self.source != 'hub' || has(self.name)",
            "name is required with source: hub; set it to a name such as Qwen/Qwen3-1.7B",
        ),
    ],
    "EvalDatasetSpec": _DATASET_RULES,
    "MixedDatasetSpec": _DATASET_RULES,
    "TrainDatasetSpec": [
        *_DATASET_RULES,
        (
            "(self.source == 'mix') == (size(self.mix) > 0)",
            "mix is required with source: mix, and used only with it; list datasets, each with a label and a weight",
        ),
    ],
    "DataSpec": [
        (
            "!has(self.instruction) || self.instruction.contains('{problem}')",
            "instruction does not contain {problem}; write it where the text of the problem belongs",
        ),
        (
            "self.promptTemplate != 'raw' || !has(self.systemPrompt)",
            "systemPrompt has no turn with promptTemplate: raw; set promptTemplate: chat, or use instruction",
        ),
    ],
    "ArithmeticSpec": [
        ("!has(self.minDigits) || self.minDigits <= self.digits", "minDigits must be at most digits"),
    ],
    "RewardSpec": [
        ("(self.name == 'custom') == has(self.path)", "path is required with name: custom, and allowed only with it"),
    ],
    "AlgorithmSpec": [
        ("self.groupSize >= 2", "groupSize must be at least 2: advantages are relative to the group mean"),
        ("self.groupSize == oldSelf.groupSize", "groupSize cannot change; start a new run"),
    ],
    "LearnerSpec": [
        (
            "self.gpus == 0 || self.processesPerReplica == self.gpus",
            "processesPerReplica must equal gpus: each rank drives one GPU",
        ),
        (
            "self.optimizer.type != 'adamw_8bit' || (self.gpus > 0 && self.strategy == 'torch')",
            "optimizer.type adamw_8bit needs gpus and strategy: torch; ZeRO divides the moments instead",
        ),
        ("self.strategy == oldSelf.strategy", "strategy cannot change: checkpoints depend on it; start a new run"),
        ("self.steps >= oldSelf.steps", "steps can only be increased"),
    ],
    "EnvVar": [
        ("!(has(self.value) && has(self.valueFrom))", "value and valueFrom are mutually exclusive; keep one of them"),
    ],
    "PodTemplateSpec": [
        (
            f"self.{field}.all(key, {' && '.join(f'!key.startsWith({prefix!r})' for prefix in RESERVED)})",
            f"{field} under {' and '.join(RESERVED)} are reserved for the operator; choose another prefix",
        )
        for field in ("labels", "annotations")
    ],
    "PodVolume": [
        (
            "[has(self.persistentVolumeClaim), has(self.emptyDir), has(self.secret), has(self.configMap)]"
            ".filter(given, given).size() == 1",
            "a volume needs exactly one of persistentVolumeClaim, emptyDir, secret, configMap",
        ),
    ],
    "DelaySpec": [
        (
            "!(self.distribution in ['lognormal', 'weibull', 'exponential']) || self.lower < self.upper",
            "lower must be below upper; for a fixed delay set distribution: constant",
        ),
        (
            "!(self.distribution in ['lognormal', 'weibull']) || self.lower > 0.0",
            "lower must be above 0 for a lognormal or weibull distribution",
        ),
        (
            "self.distribution != 'trace' || has(self.trace.path) != (size(self.trace.values) > 0)",
            "a trace needs either path (a CSV file, together with column) or values",
        ),
        ("!has(self.trace.path) || has(self.trace.column)", "trace.column is required with trace.path"),
    ],
    "WindowSpec": [
        ("self.startSeconds < self.endSeconds", "startSeconds must be below endSeconds"),
    ],
    "AvailabilitySpec": [
        ("self.type != 'windows' || size(self.windows) > 0", "type windows needs at least one window"),
        ("self.type != 'trace' || size(self.trace) > 0", "type trace needs at least one point"),
        ("self.trace.map(point, point.atSeconds).isSorted()", "atSeconds must increase from point to point"),
    ],
    "SamplerPoolSpec": [
        ("self.gpus == 0 || self.tensorParallel <= self.gpus", "tensorParallel must not exceed gpus"),
        ("self.lora != 'adapter' || self.engine == 'vllm'", "lora: adapter is served by engine: vllm only"),
        ("self.engine == oldSelf.engine", "a pool's engine cannot change; add a pool of another name"),
    ],
    "VolumeSpec": [
        (
            "has(self.claimName) == has(oldSelf.claimName)"
            " && (!has(self.claimName) || self.claimName == oldSelf.claimName)",
            "claimName cannot change; start a new run",
        ),
        (
            "has(self.storageClassName) == has(oldSelf.storageClassName)"
            " && (!has(self.storageClassName) || self.storageClassName == oldSelf.storageClassName)",
            "storageClassName cannot change; start a new run",
        ),
        ("self.accessModes == oldSelf.accessModes", "accessModes cannot change; start a new run"),
    ],
    "EvaluationSpec": [
        ("self.passK.all(k, k <= self.samplesPerPrompt)", "each k of passK must be at most samplesPerPrompt"),
        (
            f"self.temperature == 0.0 || self.temperature >= {MIN_TEMPERATURE}",
            f"temperature must be at least {MIN_TEMPERATURE}, or 0 for greedy decoding",
        ),
    ],
    "RunSpec": [
        (
            "self.model.lora.rank > 0 || self.samplers.all(pool, pool.lora == 'merged')",
            "a pool's lora: adapter needs model.lora.rank; set that, or lora: merged",
        ),
        (
            "!has(self.learner.checkpoint.keepBest)"
            " || self.data.evals.exists(set, set.label == self.learner.checkpoint.keepBest)",
            "learner.checkpoint.keepBest must be the label of one of data.evals",
        ),
        (
            "!has(self.learner.checkpoint.keepBest) || (self.evaluation.everySteps > 0"
            " && self.evaluation.everySteps % self.learner.checkpoint.everySteps == 0)",
            "with learner.checkpoint.keepBest, evaluation.everySteps must be a multiple of checkpoint.everySteps",
        ),
        (
            "self.rewards.all(a, self.rewards.exists_one(b,"
            " (has(a.path) ? a.path : a.name) == (has(b.path) ? b.path : b.name)))",
            "a reward is listed more than once in rewards",
        ),
        (
            "!self.rewards.exists(reward, reward.name == 'task') || self.data.train.source == 'reasoningGym'"
            " || self.data.train.mix.exists(dataset, dataset.source == 'reasoningGym')",
            "reward task needs problems of reasoning-gym; set data.train.source: reasoningGym, or another reward",
        ),
        (
            "self.mode != 'hetero' || self.algorithm.staleness.maxSteps > 0",
            "algorithm.staleness.maxSteps is 0, which requires mode: online; set that, or a larger maxSteps",
        ),
        (
            "self.mode != 'online' || self.samplers.all(pool, pool.delay.distribution == 'none')",
            "mode: online waits for the newest weights; remove the samplers' delay",
        ),
        (
            "self.mode != 'online' || self.learner.publish.everySteps == 1",
            "mode: online requires learner.publish.everySteps: 1",
        ),
        (
            "self.samplers.all(pool, pool.delay.unit != 'steps' || pool.delay.distribution in ['none', 'trace']"
            " || pool.delay.lower <= double(self.algorithm.staleness.maxSteps))",
            "a delay in steps exceeds algorithm.staleness.maxSteps, so every rollout would be too old; raise maxSteps",
        ),
        (
            "self.mode == 'online' || self.learner.publish.everySteps <= self.algorithm.staleness.maxSteps + 1",
            "learner.publish.everySteps exceeds algorithm.staleness.maxSteps: rollouts would grow too old in between",
        ),
        (
            "self.samplers.exists(pool, pool.replicas > 0)",
            "samplers have 0 replicas in total, so nothing would be generated; to pause a run set suspend: true",
        ),
        (
            "self.evaluation.everySteps == 0 || size(self.data.evals) > 0",
            "data.evals is empty, but evaluation.everySteps is set; add a dataset, or set everySteps: 0",
        ),
        (
            "self.samplers.map(pool, pool.replicas).sum() * self.exchange.maxPendingGroups"
            " >= self.learner.batch.groups",
            "learner.batch.groups can never be filled: each sampler pauses at exchange.maxPendingGroups; raise it",
        ),
    ],
}
"""CEL rules by block: expression, and the message when it is false."""

_COLUMNS = [
    ("State", "string", ".status.state", 0),
    ("Step", "integer", ".status.learner.step", 0),
    ("Steps", "integer", ".spec.learner.steps", 0),
    ("Reward", "number", ".status.learner.reward", 0),
    ("Lag", "number", ".status.learner.lag", 0),
    ("Samplers", "string", ".status.samplersReady", 0),
    ("Age", "date", ".metadata.creationTimestamp", 0),
    ("Model", "string", ".spec.model.name", 1),
    ("Loss", "string", ".spec.algorithm.loss.type", 1),
    ("Restarts", "integer", ".status.learner.restarts", 1),
]


def crd() -> dict[str, Any]:
    """The CustomResourceDefinition as a dict."""
    columns = [
        {"name": name, "type": kind, "jsonPath": path} | ({"priority": priority} if priority else {})
        for name, kind, path, priority in _COLUMNS
    ]
    version = {
        "name": VERSION,
        "served": True,
        "storage": True,
        "additionalPrinterColumns": columns,
        "subresources": {"status": {}},
        "schema": {"openAPIV3Schema": _root_schema()},
    }
    names = {
        "kind": KIND,
        "listKind": f"{KIND}List",
        "plural": PLURAL,
        "singular": KIND.lower(),
        "shortNames": ["hrl"],
        "categories": ["all", "heterorl"],
    }
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{PLURAL}.{GROUP}"},
        "spec": {"group": GROUP, "names": names, "scope": "Namespaced", "versions": [version]},
    }


def crd_yaml() -> str:
    """The text of `crds/heterorlrun.yaml`."""
    body = yaml.safe_dump(crd(), sort_keys=False, width=120, allow_unicode=True)
    return f"# Made by `heterorl crd` from heterorl/spec/run.py; do not edit.\n{body}"


def _root_schema() -> dict[str, Any]:
    run = schema_of(HeteroRLRun)
    name_rules = [
        ("self.metadata.name.size() <= 40", "metadata.name must be at most 40 characters: names of pods are longer"),
        (f"self.metadata.name.matches('{RUN_NAME}')", "metadata.name must start with a letter and contain no dot"),
    ]
    return {
        "type": "object",
        "description": run["description"],
        "required": ["spec"],
        "properties": {
            "apiVersion": {"type": "string"},
            "kind": {"type": "string"},
            "metadata": {"type": "object"},
            "spec": run["properties"]["spec"],
            "status": schema_of(RunStatus),
        },
        "x-kubernetes-validations": [
            {"rule": rule, "message": message} for rule, message in [*name_rules, _finished_rule()]
        ],
    }


# ── rules on changes ─────────────────────────────────────────────────────────────────────────────────────────────────
def change_rules() -> list[Rule]:
    """CEL at the spec for fields that never change, or only while the run is suspended.

    A block with parts that may change at any time, or never, is compared part by part; those that never change have
    their own rules in RULES.
    """
    rules = []
    for name, block in _fields(RunSpec).items():
        if within((name,), LIVE):
            continue
        if within((name,), IMMUTABLE):
            rules.append((f"self.{name} == oldSelf.{name}", f"{name} cannot change; start a new run"))
        elif name != "samplers":
            parts = _guarded_parts(name, block)
            unchanged = " && ".join(f"self.{part} == oldSelf.{part}" for part in parts)
            rules.append((f"oldSelf.suspend || ({unchanged})", _only_suspended(name)))
    # One rule for all parts of a pool: rules are judged at every write of a status, and this one walks two lists.
    parts = [key for key in _fields(SamplerPoolSpec) if key != "name"]
    parts = [key for key in parts if not within(("samplers", "", key), LIVE + IMMUTABLE)]
    unchanged = " && ".join(f"o.{part} == g.{part}" for part in parts)
    same = f"self.samplers.all(g, oldSelf.samplers.all(o, o.name != g.name || ({unchanged})))"
    rules.append((f"oldSelf.suspend || {same}", _only_suspended(f"samplers[].({', '.join(parts)})")))
    return rules


def _guarded_parts(name: str, block: type[Block] | None) -> list[str]:
    """The field itself, or those of its parts that change in a suspended run only, if not all of them do."""
    parts = [(name, part) for part in (_fields(block) if block else ())]
    live = [part for part in parts if any(within(entry.split("."), (".".join(part),)) for entry in LIVE)]
    if not live:
        return [name]
    return [".".join(part) for part in parts if part not in live and not within(part, IMMUTABLE)]


def _fields(block: type[Block]) -> dict[str, type[Block] | None]:
    """A block's fields as in YAML, and the block each of them holds, if any."""
    return {info.alias or name: block_in(info.annotation) for name, info in block.model_fields.items()}


def _finished_rule() -> Rule:
    """CEL at the root: a run that ended keeps its spec but for the TTL, unless it failed and is resumed."""
    kept = [(name, info) for name, info in RunSpec.model_fields.items() if name != "ttl_seconds_after_finished"]
    unchanged = " && ".join(
        # A field without a default may be absent.
        f"self.spec.{mark}{info.alias} == oldSelf.spec.{mark}{info.alias}"
        for name, info in kept
        for mark in ["?" if info.get_default() is None else ""]
    )
    return (
        "!has(oldSelf.status) || !has(oldSelf.status.completionTime)"
        " || (self.spec.failurePolicy.resumes > oldSelf.spec.failurePolicy.resumes"
        f" && oldSelf.status.?state.orValue('Failed') == 'Failed') || ({unchanged})",
        "the run has ended, so only ttlSecondsAfterFinished can change; to resume a failed run, increase"
        " failurePolicy.resumes, or create a new run with resume: true on the same claim",
    )


def _only_suspended(name: str) -> str:
    return f"{name} can change only while the run is suspended; set suspend: true first"


# ── structural schema ────────────────────────────────────────────────────────────────────────────────────────────────
def schema_of(model: type[BaseModel]) -> dict[str, Any]:
    """The structural schema of a block, references inlined, with the CEL rules of each block in it."""
    schema = model.model_json_schema(by_alias=True)
    return _structural({"$ref": f"#/$defs/{model.__name__}"}, {**schema.pop("$defs", {}), model.__name__: schema})


_DROPPED = {"title", "propertyNames", "discriminator", "default", "$defs"}


def _structural(schema: dict[str, Any], definitions: dict[str, Any]) -> dict[str, Any]:
    given, name = schema, None
    if "anyOf" in schema:
        (choice,) = (option for option in schema["anyOf"] if option.get("type") != "null")
        schema = {**choice, **{key: value for key, value in schema.items() if key != "anyOf"}}
    if "$ref" in schema:
        name = schema["$ref"].removeprefix("#/$defs/")
        schema = {**definitions[name], **{key: value for key, value in schema.items() if key != "$ref"}}
    result = {key: value for key, value in schema.items() if key not in _DROPPED}
    for bound, limit in (("exclusiveMinimum", "minimum"), ("exclusiveMaximum", "maximum")):
        if bound in result:
            result |= {limit: result[bound], bound: True}
    minimum = result.get("minimum", 0)
    if minimum != int(minimum) and "exclusiveMinimum" not in result:
        # Beside an integer the API server cuts the bound to one: 0 would be at least 0.01.
        message = f"must be at least {minimum}"
        result["x-kubernetes-validations"] = [{"rule": f"self >= {minimum}", "message": message}]
    if "const" in result:
        result["enum"] = [result.pop("const")]
    if "properties" in result:
        result["properties"] = {key: _structural(value, definitions) for key, value in result["properties"].items()}
    if "items" in result:
        result["items"] = _structural(result["items"], definitions)
    extra = result.pop("additionalProperties", False)
    if isinstance(extra, dict):
        result["additionalProperties"] = _structural(extra, definitions)
    elif extra:
        result["x-kubernetes-preserve-unknown-fields"] = True
    if rules := _rules(name):
        result["x-kubernetes-validations"] = [{"rule": rule, "message": message} for rule, message in rules]
    if given.get("default") is not None:
        # Rules see a default as it is written here, so a block that has rules needs its fields; others fill themselves.
        result["default"] = _without_nulls(given["default"]) if rules or not name else {}
    return result


def _rules(name: str | None) -> list[Rule]:
    if name == "RunSpec":
        return RULES[name] + change_rules()
    return RULES.get(name or "", [])


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value
