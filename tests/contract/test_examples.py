import re
from itertools import product
from pathlib import Path

import pytest

from heterorl.spec.load import load_run, warnings_for

EXAMPLES = Path(__file__).parents[2] / "examples"
FILES = sorted(EXAMPLES.rglob("*.yaml"))
PAPER = {
    (samplers, lag, template): EXAMPLES / f"paper/qwen3-1.7b-1l{samplers}s-lag{lag}-{template.lower()}.yaml"
    for samplers, lag, template in product((2, 4), (32, 64), ("think", "noThink"))
}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_example_validates_and_is_named_after_its_file(path):
    assert load_run(path).metadata.name == path.stem.replace(".", "-")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_only_the_papers_examples_need_a_warning(path):
    assert bool(warnings_for(load_run(path))) == (path.parent.name == "paper")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_command_in_an_example_names_that_example(path):
    (named,) = re.findall(r"examples/\S+\.yaml", path.read_text())
    assert EXAMPLES.parent / named == path


def test_quickstart_has_a_near_and_a_far_sampler():
    near, far = load_run(EXAMPLES / "quickstart.yaml").spec.samplers
    assert (near.name, near.delay.distribution) == ("near", "none")
    assert (far.name, far.delay.distribution) == ("far", "lognormal")


def test_quickstart_on_vllm_differs_in_engine_and_length_only():
    quick, vllm = (load_run(EXAMPLES / f"{name}.yaml").resolved()["spec"] for name in ("quickstart", "quickstart-vllm"))
    for spec in (quick, vllm):
        for part in (*spec["samplers"], spec["evaluation"]):
            part.pop("engine")
        spec["learner"].pop("steps")
        spec["evaluation"].pop("everySteps")
    assert quick == vllm


@pytest.mark.parametrize(("samplers", "lag", "template"), PAPER)
def test_paper_examples_say_what_their_names_say_and_are_else_equal(samplers, lag, template):
    spec = load_run(PAPER[samplers, lag, template]).resolved()["spec"]
    plain = load_run(PAPER[samplers, 32, "think"]).resolved()["spec"]
    assert sum(pool["replicas"] for pool in spec["samplers"]) == samplers
    assert spec["algorithm"]["staleness"].pop("maxSteps") == lag
    assert spec["data"].pop("promptTemplate") == template
    plain["algorithm"]["staleness"].pop("maxSteps")
    plain["data"].pop("promptTemplate")
    assert spec == plain


def test_paper_examples_hold_the_published_numbers():
    spec = load_run(PAPER[2, 32, "think"]).spec
    assert spec.model.name == "Qwen/Qwen3-1.7B"
    assert spec.learner.optimizer.learning_rate == 1e-6
    assert (spec.learner.steps, spec.learner.strategy, spec.learner.world_size) == (1295, "zero2", 4)
    assert spec.learner.batch.groups * spec.algorithm.group_size == 4 * 8 * 8
    generation = spec.generation
    assert (generation.temperature, generation.top_p, generation.top_k) == (0.6, 0.95, 20)
    assert (generation.max_prompt_tokens, generation.max_completion_tokens) == (768, 4096)
    delay = spec.pool("far").delay
    assert (delay.model, delay.lower, delay.upper, delay.confidence, delay.subtract) == ("hold", 60, 1920, 0.995, 400)
    assert [dataset.label for dataset in spec.data.evals] == ["amc23", "aime24", "aime25", "math500"]
    assert spec.evaluation.every_steps == 128
    large = load_run(EXAMPLES / "paper/qwen3-8b.yaml").spec.pool("far").delay
    assert (large.lower, large.upper) == (400, 3600)


def test_gsm8k_example_reads_the_real_files_columns(shared_data):
    import json
    import re

    run = load_run(EXAMPLES / "gsm8k-smoke.yaml", [f"data.train.path={shared_data}/gsm8k/train.jsonl"])
    columns = run.spec.data.train.columns
    row = json.loads(Path(run.spec.data.train.path or "").read_text().splitlines()[0])
    assert row[columns.prompt].startswith("Natalia sold clips")
    assert re.search(columns.answer_pattern or "", row[columns.answer]).group(1) == "72"
