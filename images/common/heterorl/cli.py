"""The command line. Each command imports what it needs when it runs, so that `heterorl validate` starts quickly."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import click

from heterorl.blame import TRANSIENT, out_of_reach
from heterorl.errors import HeteroRLError, SpecError, UserError
from heterorl.exit_codes import SITE_ERROR

_FILE = click.Path(dir_okay=False, path_type=Path)
_SET = click.option(
    "--set",
    "sets",
    multiple=True,
    metavar="PATH=VALUE",
    help="Override a field, such as algorithm.loss.type=gepo or samplers.far.replicas=2; can be repeated.",
)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="heterorl", prog_name="heterorl", message="%(prog)s %(version)s")
def cli() -> None:
    """Reinforcement learning for language models on machines that are far apart, unequal, or come and go."""


@cli.command()
@click.argument("file", type=_FILE)
@_SET
@click.option("--resume", is_flag=True, help="Resume from the newest checkpoint in the run folder.")
@click.option(
    "--runs-dir",
    type=click.Path(file_okay=False, path_type=Path),
    show_default="runs; with --resume of a run's run.json, where that run is",
    help="Folder that holds the folders of runs.",
)
def run(file: Path, sets: tuple[str, ...], resume: bool, runs_dir: Path | None) -> None:
    """Train on this machine.

    Learner and samplers run as processes; a folder in RUNS-DIR takes the place of the shared volume.

    \b
    heterorl run examples/quickstart.yaml
    heterorl run runs/quickstart/run.json --resume
    """
    from heterorl.spec.load import load_run, warnings_for

    manifest = load_run(file, sets)
    for warning in warnings_for(manifest):
        _say(f"warning: {warning}")
    from heterorl.local.preflight import runs_dir_of
    from heterorl.local.run import run_local

    place = runs_dir or (runs_dir_of(file, manifest) if resume else None) or Path("runs")
    sys.exit(run_local(file, manifest, place, resume))


@cli.command()
@click.argument("file", type=_FILE, default=Path("run.yaml"))
@click.option("--model", required=True, help="A model folder, a name on the Hub, or tiny.")
@click.option("--data", required=True, help="A data file, glob or folder of save_to_disk, or a dataset on the Hub.")
@click.option("--prompt-column", metavar="NAME", help="Column with the problem [default: by its name].")
@click.option("--answer-column", metavar="NAME", help="Column with the reference answer [default: by its name].")
def init(file: Path, model: str, data: str, prompt_column: str | None, answer_column: str | None) -> None:
    """Write a commented manifest to start from.

    FILE is run.yaml unless given, and is never overwritten.

    \b
    heterorl init --model tiny --data train.jsonl
    heterorl init mine.yaml --model Qwen/Qwen3-0.6B --data openai/gsm8k
    """
    from heterorl.local.starter import write_starter

    write_starter(file, model, data, prompt_column, answer_column)
    click.echo(f"wrote {file}; next: heterorl check {file}")


@cli.command()
@click.argument("file", type=_FILE)
@_SET
@click.option(
    "--runs-dir",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("runs"),
    show_default=True,
    help="Folder that would hold the run's; its disk is what is checked.",
)
def check(file: Path, sets: tuple[str, ...], runs_dir: Path) -> None:
    """Check all that a run would read, without training.

    In seconds: reads model, tokenizer, data, rewards, disk and devices, prints three prompts with their tokens, the
    rewards of a right and of a wrong answer, and what a step costs in memory.

    \b
    heterorl check run.yaml
    heterorl check run.yaml --set learner.batch.groups=64
    """
    from heterorl.spec.load import load_run, warnings_for

    manifest = load_run(file, sets)
    for warning in warnings_for(manifest):
        _say(f"warning: {warning}")
    from heterorl.local.check import check_run

    sys.exit(check_run(file, manifest, runs_dir))


@cli.command()
@click.argument("files", type=_FILE, nargs=-1, required=True)
@_SET
def validate(files: tuple[Path, ...], sets: tuple[str, ...]) -> None:
    """Validate manifests and report every problem at once.

    Reads no model and no data: `heterorl check` does.

    \b
    heterorl validate examples/*.yaml
    heterorl validate run.yaml --set algorithm.loss.type=gspo
    """
    from heterorl.spec.load import load_run, warnings_for

    problems = []
    for file in files:
        try:
            manifest = load_run(file, sets)
        except SpecError as error:
            problems.append(str(error))
            continue
        for warning in warnings_for(manifest):
            _say(f"warning: {file}: {warning}")
        click.echo(f"{file}: ok")
    if problems:
        raise UserError("\n".join(problems))
    _say("the fields are valid; `heterorl check FILE` also reads model, data and rewards")


@cli.command()
@click.argument("file", type=_FILE)
@_SET
@click.option("--namespace", "-n", help="Namespace of the objects [default: that of the manifest, else of kubectl].")
@click.option(
    "--images",
    default="heterorl",
    show_default=True,
    metavar="PREFIX",
    help="Prefix of the images, which are named PREFIX/learner:TAG and PREFIX/sampler:TAG.",
)
@click.option("--image-tag", metavar="TAG", help="Tag of the images [default: this version].")
def render(file: Path, sets: tuple[str, ...], namespace: str | None, images: str, image_tag: str | None) -> None:
    """Print the Kubernetes objects of a run.

    For clusters without the operator.

    \b
    heterorl render run.yaml | kubectl apply -f -
    heterorl render run.yaml --images registry.example.com/rl --image-tag 1.0
    """
    from importlib.metadata import version

    from heterorl.kubernetes.manifests import Images
    from heterorl.kubernetes.render import render
    from heterorl.spec.load import load_run, warnings_for

    manifest, tag = load_run(file, sets), image_tag or version("heterorl")
    text, notes = render(
        manifest, file.resolve().parent, Images(f"{images}/learner:{tag}", f"{images}/sampler:{tag}"), namespace
    )
    for warning in [*warnings_for(manifest), *notes]:
        _say(f"warning: {warning}")
    click.echo(text, nl=False)


@cli.command()
@click.option("--check", is_flag=True, help="Compare only; exit with 1 if a file is out of date.")
def crd(check: bool) -> None:
    """Generate the CRD from the spec.

    Writes crds/heterorlrun.yaml and the chart's copy of it.
    """
    from heterorl.spec.crd import crd_yaml

    for folder in ("crds", "charts/heterorl/files"):
        _generate(Path(folder) / "heterorlrun.yaml", crd_yaml(), "heterorl crd", check)


@cli.command()
@click.option("--check", is_flag=True, help="Compare only; exit with 1 if the file is out of date.")
def docs(check: bool) -> None:
    """Generate docs/spec.md from the spec."""
    from heterorl.spec.reference import spec_markdown

    _generate(Path("docs/spec.md"), spec_markdown(), "heterorl docs", check)


@cli.command(
    name="eval",
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
    add_help_option=False,
)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED, metavar="MODEL|RUN --data FILE")
def evaluate(arguments: tuple[str, ...]) -> None:
    """Evaluate a model on datasets."""
    sys.exit(subprocess.call([sys.executable, "-m", "heterorl_sampler.eval_command", *arguments]))


@cli.command()
@click.argument("runs", nargs=-1, required=True, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option(
    "--out", type=click.Path(file_okay=False, path_type=Path), help="Output folder [default: that of the first run]."
)
def report(runs: tuple[Path, ...], out: Path | None) -> None:
    """Report on a run, or compare several.

    Writes report.html, one file that needs no server, and with matplotlib report.png.

    \b
    heterorl report runs/quickstart
    heterorl report runs/gepo runs/gspo --out compared
    """
    from heterorl.report.page import write_report

    click.echo(f"wrote {write_report(list(runs), out)}")


@cli.command()
@click.argument("run", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("repo")
@click.option("--step", type=click.IntRange(min=0), metavar="N", help="The checkpoint of step N instead of the output.")
@click.option("--private", is_flag=True, help="Create the repository as a private one.")
@click.option("--dry-run", is_flag=True, help="Say what would be uploaded, and upload nothing.")
def push(run: Path, repo: str, step: int | None, private: bool, dry_run: bool) -> None:
    """Upload a run's model to the Hugging Face Hub.

    RUN is its folder, REPO a name such as my-team/my-model. The token is that of HF_TOKEN or of `hf auth login`.

    \b
    heterorl push runs/quickstart my-team/my-model --dry-run
    heterorl push runs/quickstart my-team/my-model --private
    """
    from heterorl.local.push import push, upload_of

    upload = upload_of(run, step)
    if dry_run:
        for name, size in upload.files:
            click.echo(f"{size:>14,}  {name}")
        click.echo(f"{sum(size for _, size in upload.files):>14,}  bytes would go from {upload.folder} to {repo}")
    else:
        click.echo(f"pushed {upload.folder} to {push(upload, repo, private=private)}")


@cli.command()
@click.argument("run", type=click.Path(path_type=Path))
def attach(run: Path) -> None:
    """Show the live view of a run that goes on elsewhere.

    RUN is its folder. Ctrl-C leaves the run as it is.

    \b
    heterorl attach runs/quickstart
    """
    from heterorl.local.attach import attach

    attach(run)


@cli.command(name="list")
@click.argument("folders", nargs=-1, type=click.Path(path_type=Path), metavar="[FOLDER]...")
def list_runs(folders: tuple[Path, ...]) -> None:
    """List runs: state, progress, reward.

    FOLDERS are folders of runs, or folders that hold them [default: runs].

    \b
    heterorl list
    heterorl list runs/quickstart /mnt/team/runs
    """
    from heterorl.ui.listing import print_runs

    print_runs(list(folders) or [Path("runs")])


@cli.command()
@click.argument("runs", nargs=-1, type=click.Path(path_type=Path))
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    help="Address to listen on; others than this machine's need a token.",
)
@click.option("--port", default=6070, show_default=True, help="Port to listen on; 0 takes any free one.")
@click.option(
    "--token",
    envvar="HETERORL_UI_TOKEN",
    help="Token that visitors need [default: made up where HOST is not this machine].",
)
def ui(runs: tuple[Path, ...], host: str, port: int, token: str | None) -> None:
    """Show runs in a browser, also while they go on.

    RUNS are folders of runs, or folders that hold them [default: runs]. Nothing is written to them.

    \b
    heterorl ui                        all runs below runs/
    heterorl ui runs/a runs/b          these two
    """
    try:
        from heterorl.ui.server import serve
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name} is not installed; pip install 'heterorl[ui]'") from error

    serve(list(runs) or [Path("runs")], host, port, token, click.echo)


def _generate(path: Path, text: str, command: str, check: bool) -> None:
    if check:
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            raise HeteroRLError(f"{path} is out of date; run `{command}`")
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    click.echo(f"wrote {path}")


def _say(text: str) -> None:
    for line in text.splitlines():
        click.echo(f"heterorl: {line}", err=True)


def main(arguments: list[str] | None = None) -> None:
    """`heterorl`."""
    run_command(cli, "heterorl", arguments)


def run_command(command: click.Command, name: str, arguments: list[str] | None = None) -> None:
    """Run a command; expected errors are printed without a stack trace and exit with the code of their class."""
    try:
        command.main(args=arguments, prog_name=name, standalone_mode=False)
    except HeteroRLError as error:
        _say(str(error))
        sys.exit(error.exit_code)
    except OSError as error:
        if error.errno not in TRANSIENT:
            raise
        _say(f"{out_of_reach(error, Path.cwd())}; try again when it is back")
        sys.exit(SITE_ERROR)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        sys.exit(2)
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        way_out = f"; see `{context.command_path} --help`" if context else ""
        _say(error.format_message().removesuffix(".") + way_out)
        sys.exit(2)
    except (click.Abort, KeyboardInterrupt):
        sys.exit(130)
