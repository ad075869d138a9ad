import errno
import hashlib
import json
import shutil

import huggingface_hub.constants
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from builders import exchange_at, run_of
from heterorl.entry import Stop, perform
from heterorl.errors import DataError, ModelError
from heterorl.exchange.exchange import Exchange
from heterorl.exchange.storage import Files
from heterorl.spec.run import TinyModelSpec
from heterorl_learner.__main__ import PROGRAMS
from heterorl_learner.prepare import prepare
from heterorl_learner.tiny import build_model, build_tokenizer

TINY = {"source": "tiny", "tiny": {"hiddenSize": 32, "numLayers": 1, "targetAccuracy": 0}}


def exchange_with(root, *, model=TINY, train=None, files=None, **spec):
    """A run's folder whose manifest holds that model and data; nothing is prepared yet."""
    train = train or {"source": "arithmetic", "arithmetic": {"digits": 1, "rows": 50}}
    data = {"train": train, **spec.pop("data", {})}
    return exchange_at(root, run_of("prepared", model=model, data=data, **spec), files=files)


@pytest.fixture(scope="session")
def ready_model(tmp_path_factory):
    """A complete Hugging Face folder, to be copied before it is damaged."""
    folder = tmp_path_factory.mktemp("ready")
    tokenizer = build_tokenizer()
    build_model(TinyModelSpec(hidden_size=32, num_layers=1, seed=7), tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def model_folder(ready_model, tmp_path):
    return shutil.copytree(ready_model, tmp_path / "model-folder")


def left_behind(exchange):
    """What preparation has put into the run's folder, finished or not."""
    return sorted(path.name for path in exchange.root.iterdir() if path.name != "run.json")


def path_model(folder):
    return {"source": "path", "path": str(folder)}


def rows_of(exchange, name):
    return [json.loads(line) for line in exchange.data_file(name).read_text().splitlines()]


def test_tiny_run_gets_a_model_that_loads_tokenised_rows_and_a_marker_that_counts_them(tmp_path):
    evals = [{"label": "sums", "source": "arithmetic", "arithmetic": {"digits": 2, "rows": 7}}]
    exchange = exchange_with(tmp_path, data={"evals": evals})
    info = prepare(exchange)
    assert {name: (data.rows, data.skipped) for name, data in info.data.items()} == {
        "train": (50, 0),
        "eval-sums": (7, 0),
    }
    assert info.data["train"].digest == hashlib.sha256(exchange.data_file("train").read_bytes()).hexdigest()
    assert exchange.prepared == info
    tokenizer = AutoTokenizer.from_pretrained(exchange.model_dir)
    for row in rows_of(exchange, "train") + rows_of(exchange, "eval-sums"):
        assert tokenizer.decode(row["prompt_ids"]) == row["prompt"]
        a, b = row["prompt"].rstrip("=").split("+")
        assert int(row["answer"]) == int(a) + int(b)
    assert AutoModelForCausalLM.from_pretrained(exchange.model_dir).config.hidden_size == 32
    assert left_behind(exchange) == ["data", "model", "prepared.json"]


def test_supervision_is_told_in_the_marker_and_follows_the_runs_seed(tmp_path):
    tiny = {"hiddenSize": 32, "numLayers": 1, "targetAccuracy": 0.01, "supervisedLearningRate": 0.01}
    model = {"source": "tiny", "tiny": tiny}
    infos = [prepare(exchange_with(tmp_path / str(n), model=model, seed=seed)) for n, seed in enumerate((1, 1, 2))]
    assert 0.01 <= infos[0].model.held_out_accuracy < 1
    assert infos[0].model.supervised_steps >= 20
    assert infos[0] == infos[1]
    assert infos[0].model.digest != infos[2].model.digest


def test_prepared_run_is_left_alone(tmp_path):
    exchange = exchange_with(tmp_path)
    first = prepare(exchange)
    shutil.rmtree(exchange.model_dir)
    assert prepare(exchange) == first
    assert not exchange.model_dir.exists()


def test_preparation_that_was_cut_off_starts_over(tmp_path, ready_model):
    exchange = exchange_with(tmp_path)
    shutil.copytree(ready_model, exchange.model_dir)  # renamed, but the marker never came
    (tmp_path / ".tmp-model").mkdir()
    (tmp_path / ".tmp-model" / "half.safetensors").write_bytes(b"x")
    prepare(exchange)
    assert left_behind(exchange) == ["data", "model", "prepared.json"]
    assert not (exchange.model_dir / "half.safetensors").exists()
    ours = AutoModelForCausalLM.from_pretrained(exchange.model_dir).model.embed_tokens.weight
    assert not torch.equal(ours, AutoModelForCausalLM.from_pretrained(ready_model).model.embed_tokens.weight)


@pytest.mark.parametrize("inner", ["", "model"])
def test_model_of_a_path_is_copied_from_the_folder_or_the_checkpoint_around_it(tmp_path, ready_model, inner):
    shutil.copytree(ready_model, tmp_path / "step-00000050" / inner)
    (tmp_path / "step-00000050" / "state.pt").write_bytes(b"optimizer")
    exchange = exchange_with(tmp_path / "run", model=path_model(tmp_path / "step-00000050"))
    prepare(exchange)
    name = "model.safetensors"
    assert (exchange.model_dir / name).read_bytes() == (ready_model / name).read_bytes()
    assert not (exchange.model_dir / "state.pt").exists()


def test_path_to_another_run_takes_its_output_and_not_its_start(tmp_path, ready_model):
    earlier = exchange_with(tmp_path / "earlier")
    prepare(earlier)
    shutil.copytree(ready_model, earlier.output_dir)
    exchange = exchange_with(tmp_path / "run", model=path_model(earlier.root))
    assert prepare(exchange).model.source == str(earlier.output_dir)


@pytest.mark.parametrize(
    ("missing", "told"),
    [
        ("config.json", "no config.json"),
        ("model.safetensors", "no model.safetensors"),
        ("tokenizer*", "no tokenizer"),
    ],
)
def test_incomplete_model_folder_is_refused_by_name_and_leaves_nothing(tmp_path, model_folder, missing, told):
    for path in model_folder.glob(missing):
        path.unlink()
    exchange = exchange_with(tmp_path / "run", model=path_model(model_folder))
    with pytest.raises(ModelError, match=told) as caught:
        prepare(exchange)
    assert "\n" not in str(caught.value)
    assert left_behind(exchange) == []


def test_missing_shard_and_damaged_weights_are_refused(tmp_path, model_folder):
    exchange = exchange_with(tmp_path / "run", model=path_model(model_folder))
    weights = model_folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelError, match=r"model\.safetensors cannot be read"):
        prepare(exchange)
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (model_folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"no model-00001-of-00002\.safetensors"):
        prepare(exchange)


def test_prompt_and_completion_must_fit_the_model(tmp_path):
    exchange = exchange_with(tmp_path, generation={"maxPromptTokens": 8000, "maxCompletionTokens": 193})
    with pytest.raises(ModelError, match="is 8193, but the model reads 8192"):
        prepare(exchange)


def test_bad_data_leaves_nothing_half_written(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"problem": "1+1=", "answer": "2"}\n{"problem": "1+2="}\n')
    exchange = exchange_with(tmp_path / "run", train={"source": "file", "path": str(tmp_path / "rows.jsonl")})
    with pytest.raises(DataError, match="line 2"):
        prepare(exchange)
    assert left_behind(exchange) == []


def test_too_long_prompts_are_counted_and_skipped(tmp_path):
    (tmp_path / "rows.jsonl").write_text(
        '{"problem": "1+1=", "answer": "2"}\n{"problem": "1+1+1+1+1=", "answer": "5"}\n'
    )
    train = {"source": "file", "path": str(tmp_path / "rows.jsonl")}
    exchange = exchange_with(tmp_path / "run", train=train, generation={"maxPromptTokens": 6})
    data = prepare(exchange).data["train"]
    assert (data.rows, data.skipped) == (1, 1)
    assert [row["id"] for row in rows_of(exchange, "train")] == [0]


class FullDisk(Files):
    """No room for a model's folder."""

    def sync_file(self, path):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))


def test_full_volume_leaves_no_half_written_model(tmp_path):
    exchange = exchange_with(tmp_path, files=FullDisk())
    with pytest.raises(OSError, match="No space left"):
        prepare(exchange)
    assert left_behind(exchange) == ["data"]
    assert exchange.prepared is None


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """An empty cache, and a Hub that cannot be reached."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


HUB_MODEL = {"source": "hub", "name": "somebody/small"}


def test_hub_that_cannot_be_reached_is_one_line_with_the_way_out(tmp_path, hub_cache):
    exchange = exchange_with(tmp_path / "run", model=HUB_MODEL)
    with pytest.raises(ModelError, match="somebody/small: the Hugging Face Hub cannot be reached") as caught:
        prepare(exchange)
    assert "source: path" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert left_behind(exchange) == []


def test_hub_model_in_the_local_cache_needs_no_network(tmp_path, hub_cache, ready_model):
    stored = hub_cache / "models--somebody--small"
    commit = "0123456789abcdef0123456789abcdef01234567"
    shutil.copytree(ready_model, stored / "snapshots" / commit)
    (stored / "refs").mkdir()
    (stored / "refs" / "main").write_text(commit)
    exchange = exchange_with(tmp_path / "run", model=HUB_MODEL)
    prepare(exchange)
    assert AutoModelForCausalLM.from_pretrained(exchange.model_dir).config.hidden_size == 32


def test_impossible_hub_name_is_refused(tmp_path, hub_cache):
    with pytest.raises(ModelError, match=r"Qwen/Qwen3-1\.7B"):
        prepare(exchange_with(tmp_path / "run", model={"source": "hub", "name": "a/b/c"}))


def command(*arguments):
    """`python -m heterorl_learner prepare ...`, in this process."""
    return perform("heterorl_learner", PROGRAMS, ["prepare", *arguments], Stop())


@pytest.mark.usefixtures("own_logging")
def test_command_ends_with_code_2_and_one_line(tmp_path, capsys):
    exchange = exchange_with(tmp_path / "run", model=path_model(tmp_path / "nowhere"))
    assert command("--root", str(exchange.root)) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert "is not a folder; set it to the folder of a Hugging Face model" in lines[0]


@pytest.mark.usefixtures("own_logging")
def test_a_spec_given_by_file_is_left_in_the_runs_folder(tmp_path):
    elsewhere = exchange_with(tmp_path / "config")
    assert command("--root", str(tmp_path / "run"), "--spec", str(elsewhere.run_file)) == 0
    exchange = Exchange(tmp_path / "run")
    assert exchange.prepared is not None
    assert exchange.run == elsewhere.run


@pytest.mark.usefixtures("own_logging")
def test_a_volume_of_another_run_is_refused_before_anything_is_put_on_it(tmp_path, capsys):
    other = exchange_with(tmp_path)
    mine = tmp_path / "mine.json"
    run = other.run.resolved()
    mine.write_text(json.dumps({**run, "metadata": {"name": "mine"}}))
    assert command("--root", str(tmp_path), "--spec", str(mine)) == 2
    assert f"VolumeInUse: {tmp_path} holds run prepared;" in capsys.readouterr().err.splitlines()[-1]
    assert not other.model_dir.exists()
    mine.write_text(json.dumps({**run, "metadata": {"name": "mine"}, "spec": {**run["spec"], "resume": True}}))
    assert command("--root", str(tmp_path), "--spec", str(mine)) == 0
    assert Exchange(tmp_path, spec_file=mine).prepared.run == "mine"


def test_a_preparation_that_put_nothing_on_the_volume_leaves_it_free_for_any_run(tmp_path):
    def on_volume(name, uid, path):
        file = tmp_path / f"{uid}.json"
        data = {"train": {"source": "arithmetic", "arithmetic": {"digits": 1, "rows": 50}}}
        run = run_of(name, metadata={"name": name, "uid": uid}, model=path_model(path), data=data)
        file.write_text(json.dumps(run.resolved()))
        return Exchange(tmp_path / "volume", spec_file=file)

    mistaken = on_volume("mistaken", "uid-1", tmp_path / "nowhere")
    mistaken.occupy()
    with pytest.raises(ModelError, match="nowhere"):
        prepare(mistaken)
    on_volume("corrected", "uid-2", tmp_path / "somewhere").occupy()
