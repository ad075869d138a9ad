import json

import pytest

from heterorl.errors import SpecError
from heterorl.spec.load import load_run, warnings_for

GOOD = """\
apiVersion: heterorl.dev/v1alpha1
kind: HeteroRLRun
metadata:
  name: test
spec:
  learner:
    steps: 10
  samplers:
  - name: near
  - name: far
    delay: {distribution: lognormal, lower: 4, upper: 30}
"""


@pytest.fixture
def manifest(tmp_path):
    """Writes a manifest: the good one with some text replaced."""

    def write(*replacements, text=GOOD):
        for old, new in replacements:
            assert old in text
            text = text.replace(old, new)
        path = tmp_path / "run.yaml"
        path.write_text(text)
        return path

    return write


def problems(path, *sets):
    with pytest.raises(SpecError) as caught:
        load_run(path, sets)
    assert caught.value.exit_code == 2
    return caught.value.problems


def test_good_manifest_loads_with_its_values_and_defaults(manifest):
    run = load_run(manifest())
    assert run.metadata.name == "test"
    assert run.spec.learner.steps == 10
    assert run.spec.pool("far").delay.upper == 30
    assert run.spec.algorithm.loss.type == "gepo"


def test_all_problems_are_reported_at_once_with_line_path_found_and_advice(manifest):
    path = manifest(
        ("spec:\n", "spec:\n  mode: onlin\n  algorithm: {loss: {type: geppo}, groupSize: 1}\n"),
        ("steps: 10", "stepz: 10"),
        ("  - name: far\n", "  - name: near\n    replicas: '2'\n"),
        ("lower: 4, upper: 30", "lower: 40, upper: 30"),
    )
    found = problems(path)
    assert [line.split(": ")[:2] for line in found] == [
        ["line 6", "spec.mode"],
        ["line 7", "spec.algorithm.groupSize"],
        ["line 7", "spec.algorithm.loss.type"],
        ["line 9", "spec.learner.stepz"],
        ["line 10", "spec.samplers"],
        ["line 13", "spec.samplers.near.replicas"],
        ["line 14", "spec.samplers.near.delay.lower"],
    ]
    text = "\n".join(found)
    assert 'found "onlin", expected one of hetero, online; did you mean online?' in text
    assert "unknown field; did you mean steps?" in text
    assert "near is used more than once" in text
    assert 'found "2", expected an integer; remove the quotes: 2' in text
    assert "is 40 and must be below upper, which is 30" in text
    assert "is 1, but advantages are relative to the group mean" in text


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("steps: 10", "check_point: {}", "did you mean checkpoint?"),
        ("steps: 10", "max_grad_norm: 3", "did you mean spec.learner.optimizer.maxGradNorm?"),
        ("steps: 10", "groupSize: 3", "unknown field; did you mean spec.algorithm.groupSize?"),
        ("steps: 10", "finish_grace_seconds: 3", "did you mean finishGraceSeconds?"),
        ("steps: 10", "xyz: 3", "unknown field; valid fields are batch, checkpoint"),
        ("steps: 10", "steps: 0", "found 0, expected at least 1"),
        ("steps: 10", "steps: 1.0", "found 1.0, expected an integer"),
        ("steps: 10", "steps: true", "found true, expected an integer"),
        ("steps: 10", "steps:", "found null, expected an integer; set a value or remove the line"),
        ("steps: 10", "batch: 3", "found 3, expected a mapping"),
        ("steps: 10", "gradientCheckpointing: yes", 'found "yes", expected true or false; use true'),
        ("steps: 10", "optimizer: {betas: [0.9]}", "found length 1, expected at least 2"),
        ("steps: 10", "optimizer: {eps: .nan}", "expected a finite number"),
        ("name: test", "name: 3", 'found 3, expected a string; put it in quotes: "3"'),
        ("name: test", "name: no_good", "expected lower-case letters, digits and '-'"),
        ("name: test", f"name: {'x' * 41}", "expected at most 40 characters"),
        ("  - name: far\n", "  - gpus: 0\n", "spec.samplers.1.name: is required but missing"),
        ("v1alpha1", "v1", 'found "heterorl.dev/v1", expected heterorl.dev/v1alpha1'),
    ],
)
def test_each_mistake_gets_a_sentence_that_names_the_way_out(manifest, old, new, expected):
    (problem,) = problems(manifest((old, new)))
    assert expected in problem


def test_rules_about_a_field_that_is_already_reported_are_not_reported_again(manifest):
    found = problems(manifest(("lower: 4, upper: 30", "lower: 40, upper: high")))
    assert len(found) == 1
    assert found[0].endswith('spec.samplers.far.delay.upper: found "high", expected a number')


def test_numbers_of_yaml_1_2_are_numbers_and_its_text_is_text(manifest):
    run = load_run(manifest(("steps: 10", "optimizer: {learningRate: 3e-4}"), ("name: test", "name: no")))
    assert run.spec.learner.optimizer.learning_rate == 3e-4
    assert run.metadata.name == "no"


def test_a_repeated_key_is_refused_with_both_lines(manifest):
    assert problems(manifest(("steps: 10", "steps: 10\n    steps: 20"))) == [
        "line 8: spec.learner.steps: duplicate key, first on line 7; keep one"
    ]


def test_yaml_that_cannot_be_parsed_is_one_line_with_its_number(manifest):
    (problem,) = problems(manifest(("steps: 10", "steps: [10")))
    assert problem.startswith("line 8: not valid YAML: ")
    assert "\n" not in problem


@pytest.mark.parametrize("text", ["", "- a list\n", "just text\n"])
def test_a_file_that_is_not_a_mapping_is_refused(manifest, text):
    assert "not a HeteroRLRun" in problems(manifest(text=text))[0]


def test_a_missing_file_is_one_line(tmp_path):
    assert problems(tmp_path / "none.yaml") == ["no such file"]


def test_what_kubectl_prints_can_be_read_back(manifest):
    path = manifest(("name: test", "name: test\n  uid: abc\n  generation: 3"))
    path.write_text(path.read_text() + "status: {observedGeneration: 3}\n")
    assert load_run(path).metadata.name == "test"


def test_set_changes_fields_and_list_items_by_name_or_number(manifest):
    run = load_run(
        manifest(),
        [
            "algorithm.loss.type=grpo",
            "spec.learner.optimizer.learningRate=1e-3",
            "samplers.far.replicas=2",
            "samplers.0.engine=transformers",
            "data.train={source: file, path: x.jsonl}",
            "name=other",
        ],
    )
    assert run.spec.algorithm.loss.type == "grpo"
    assert run.spec.learner.optimizer.learning_rate == 1e-3
    assert [(g.name, g.replicas, g.engine) for g in run.spec.samplers] == [
        ("near", 1, "transformers"),
        ("far", 2, "vllm"),
    ]
    assert run.spec.data.train.path == "x.jsonl"
    assert run.metadata.name == "other"


def test_a_wrong_value_from_set_is_reported_as_such(manifest):
    assert problems(manifest(), "learner.steps=ten", "algorithm.loss.typ=grpo") == [
        "--set: spec.algorithm.loss.typ: unknown field; did you mean type?",
        '--set: spec.learner.steps: found "ten", expected an integer',
    ]


def test_a_problem_that_is_only_there_with_set_is_reported_as_its_own_wherever_it_shows(manifest):
    path = manifest(("steps: 10", "steps: 0"))
    sets = ["data.columns.prompt=question", "samplers.far.delay.upper=2"]
    assert [problem.split(": ")[:2] for problem in problems(path, *sets)] == [
        ["line 7", "spec.learner.steps"],
        ["--set", "spec.data.columns"],  # which the file does not have
        ["--set", "spec.samplers.far.delay.lower"],  # whose value is the file's
    ]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("learner.steps", "expected path=value"),
        ("samplers.fra.replicas=2", "spec.samplers has no item fra"),
        ("learner.steps.x=2", "spec.learner.steps is 10, so it has no x"),
        ("learner.steps=[", "is not valid YAML"),
    ],
)
def test_a_change_that_cannot_be_made_is_refused(manifest, change, expected):
    assert expected in problems(manifest(), change)[0]


@pytest.mark.parametrize("pattern", ["(", "*", "a{3,2}"])
def test_an_answer_pattern_that_cannot_be_compiled_is_refused_at_its_field(manifest, pattern):
    for field in ("data.train.columns", "data.evals"):
        columns = f"{{answerPattern: '{pattern}'}}"
        value = columns if field == "data.train.columns" else f"[{{label: a, columns: {columns}}}]"
        (problem,) = problems(manifest(), f"{field}={value}")
        assert "columns.answerPattern: " in problem
        assert f"{pattern!r} is not a valid regular expression: " in problem
    assert load_run(manifest(), ["data.train.columns={answerPattern: '#### (.+)'}"])


@pytest.mark.parametrize(
    "path", ["brevity", "mine/rewards.py:brevity", "mine.rewards:brevity", ".brevity", "mine.", "a..b"]
)
def test_a_custom_reward_that_is_not_a_dotted_path_is_refused(manifest, path):
    (problem,) = problems(manifest(), f"rewards=[{{name: custom, path: '{path}'}}]")
    assert problem == (
        f'--set: spec.rewards.custom.path: found "{path}", expected the import path of a function, such as '
        "package.module.function"
    )


def test_a_parameter_of_a_loss_that_is_not_chosen_is_warned_about(manifest):
    assert warnings_for(load_run(manifest(), ["algorithm.loss.gspo.low=0.1", "algorithm.loss.type=gspo"])) == []
    sets = ["algorithm.loss.gspo.low=0.1", "algorithm.loss.dr_grpo.delta=2", "algorithm.loss.gepo.high=0.4"]
    assert warnings_for(load_run(manifest(), sets)) == [
        "spec.algorithm.loss.dr_grpo.delta is set, but loss.type is gepo",
        "spec.algorithm.loss.gspo.low is set, but loss.type is gepo",
    ]


def test_a_resolved_manifest_which_names_every_default_is_not_warned_about(tmp_path, manifest):
    resolved = tmp_path / "run.json"
    resolved.write_text(json.dumps(load_run(manifest(), ["algorithm.loss.type=gspo"]).resolved()))
    assert warnings_for(load_run(resolved)) == []


def test_settings_that_change_the_sampling_distribution_are_warned_about_by_name(manifest):
    assert warnings_for(load_run(manifest())) == []
    (warning,) = warnings_for(load_run(manifest(), ["generation.topP=0.95", "generation.topK=20"]))
    assert "topP 0.95, topK 20 change the sampling distribution" in warning
