import errno
import re
from pathlib import Path

import pytest

from heterorl.cli import cli, main

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(capsys, *arguments):
    """Exit code, standard output and standard error of a command."""
    code = 0
    try:
        main(list(arguments))
    except SystemExit as ended:
        code = ended.code
    out, err = capsys.readouterr()
    return code, out, err


def test_validate_reports_all_problems_of_all_files_and_exits_2(capsys, tmp_path):
    bad = tmp_path / "bad.yaml"
    bad.write_text("apiVersion: heterorl.dev/v1alpha1\nkind: HeteroRLRun\nmetadata: {name: 3}\nspec: {}\n")
    good, missing = EXAMPLES / "quickstart.yaml", tmp_path / "missing.yaml"
    code, out, err = run(capsys, "validate", str(bad), str(good), str(missing))
    assert code == 2
    assert out == f"{good}: ok\n"
    assert err.splitlines() == [
        f'heterorl: {bad}: line 3: metadata.name: found 3, expected a string; put it in quotes: "3"',
        f"heterorl: {bad}: line 4: spec.samplers: is required but missing",
        f"heterorl: {missing}: no such file",
    ]


def test_validate_prints_warnings_and_exits_0(capsys):
    code, _, err = run(capsys, "validate", str(EXAMPLES / "online.yaml"), "--set", "generation.topP=0.9")
    assert code == 0
    assert err.startswith("heterorl: warning: ")


def test_run_refuses_a_bad_manifest_before_it_writes_anything(capsys, tmp_path):
    runs = tmp_path / "runs"
    code, _, err = run(
        capsys, "run", str(EXAMPLES / "quickstart.yaml"), "--set", "learner.stepz=1", "--runs-dir", str(runs)
    )
    assert code == 2
    assert "did you mean steps?" in err
    assert not runs.exists()


def test_an_unknown_option_is_one_line_and_exits_2(capsys):
    code, _, err = run(capsys, "run", "x.yaml", "--resum")
    assert code == 2
    assert err.startswith("heterorl: No such option")
    assert "--resume" in err
    assert err.endswith("; see `heterorl run --help`\n")


def test_interrupting_a_command_exits_130(capsys, monkeypatch):
    def interrupted(**_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.commands["validate"], "callback", interrupted)
    assert run(capsys, "validate", "x.yaml")[0] == 130


def test_a_folder_that_is_out_of_reach_is_one_line_and_exits_3(capsys, monkeypatch):
    def away(**_):
        raise OSError(errno.ENOTCONN, "Transport endpoint is not connected", "/volume/run.json")

    monkeypatch.setattr(cli.commands["list"], "callback", away)
    code, _, err = run(capsys, "list")
    assert code == 3
    assert err == (
        "heterorl: /volume/run.json is out of reach of this node (Transport endpoint is not connected); try again when"
        " it is back\n"
    )


@pytest.mark.parametrize("command", ["crd", "docs"])
def test_check_fails_where_the_generated_file_is_not_up_to_date(capsys, monkeypatch, tmp_path, command):
    monkeypatch.chdir(tmp_path)
    assert run(capsys, command, "--check")[0] == 1
    assert run(capsys, command)[0] == 0
    assert run(capsys, command, "--check")[0] == 0
    written = next(path for path in tmp_path.rglob("*") if path.is_file())
    written.write_text("old")
    code, _, err = run(capsys, command, "--check")
    assert code == 1
    assert f"run `heterorl {command}`" in err


def test_the_help_of_every_command_is_one_whole_line_in_the_list(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    _, out, _ = run(capsys, "--help")
    listed = out.partition("Commands:\n")[2].splitlines()
    assert [line.split()[0] for line in listed] == sorted(cli.commands)
    assert [line for line in listed if line.endswith("...")] == []


@pytest.mark.parametrize(
    "command", ["run", "init", "check", "validate", "render", "report", "push", "attach", "list", "ui"]
)
def test_the_help_of_a_command_has_examples_whose_options_exist(capsys, monkeypatch, command):
    monkeypatch.setenv("COLUMNS", "80")
    _, out, _ = run(capsys, command, "--help")
    examples = re.findall(rf"^  heterorl {command}\b(.*)$", out, re.MULTILINE)
    assert examples
    assert [line for line in out.splitlines() if len(line) > 80] == []
    known = {name for parameter in cli.commands[command].params for name in parameter.opts}
    assert {word for example in examples for word in example.split() if word.startswith("--")} <= known


def test_resuming_the_resolved_manifest_of_a_run_goes_on_in_the_folder_it_lies_in(capsys, monkeypatch, tmp_path):
    given = []
    monkeypatch.setattr("heterorl.local.run.run_local", lambda *arguments: given.append(arguments) or 0)
    file = tmp_path / "elsewhere" / "quickstart" / "run.json"
    file.parent.mkdir(parents=True)
    file.write_text((EXAMPLES / "quickstart.yaml").read_text())
    calls = {
        (str(file), "--resume"): tmp_path / "elsewhere",
        (str(file), "--resume", "--runs-dir", "mine"): Path("mine"),
        (str(file), "--resume", "--set", "name=other"): Path("runs"),
        (str(file),): Path("runs"),
        (str(EXAMPLES / "quickstart.yaml"), "--resume"): Path("runs"),
    }
    for arguments in calls:
        assert run(capsys, "run", *arguments)[0] == 0
    assert [runs_dir for _, _, runs_dir, _ in given] == list(calls.values())
