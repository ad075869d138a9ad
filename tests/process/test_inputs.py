"""What people bring, as it is in the wild: twelve inputs, each checked as `heterorl check` does and trained on for two steps.

All of it runs in this process, learner and sampler side by side, by the programs that `heterorl check` and
`heterorl run` start: imports, not the work, would take the time.
"""

from __future__ import annotations

import gzip
import json
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from builders import run_of
from heterorl.entry import Stop, perform
from heterorl.exchange.exchange import Exchange
from heterorl.local.preflight import look
from heterorl.monitoring.metrics import Metrics
from heterorl_learner.__main__ import PROGRAMS as LEARNER
from heterorl_learner.engines.build import build_engine
from heterorl_learner.prepare import prepare
from heterorl_learner.train import Trainer
from heterorl_sampler.__main__ import PROGRAMS as SAMPLER
from heterorl_sampler.__main__ import serve

pytestmark = pytest.mark.usefixtures("own_logging")


@dataclass
class Input:
    """A manifest's `data`, how its files are made, and what a check says of them."""

    make: Callable[[Path], object]
    data: dict[str, Any]
    says: list[str]
    """Lines, or beginnings of them, in any order."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Of the first step, where they are known beforehand."""


def jsonl(path: Path, *rows: Any) -> None:
    path.write_bytes(lines(*rows))


def lines(*rows: Any) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def chat(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def sums(start: int, count: int) -> list[dict[str, str]]:
    return [{"problem": f"{i}+{i}=", "answer": str(2 * i)} for i in range(start, start + count)]


def dapo(folder: Path) -> None:
    """As DAPO-Math-17k: the reference is in an inner column, the prompt a list of messages."""
    ask = "Solve the following math problem step by step.\n\nFind x if x+3=37."
    rows = [
        {
            "data_source": "math_dapo",
            "prompt": [{"content": ask, "role": "user"}],
            "ability": "MATH",
            "reward_model": {"ground_truth": answer, "style": "rule-lighteval/MATH_v2"},
            "extra_info": {"index": f"{index:08d}"},
        }
        for index, answer in enumerate(["34", "-7", "113"])
    ]
    parquet(folder / "dapo.parquet", rows)


def numina(folder: Path) -> None:
    """As NuminaMath: proofs among the rows, which have no answer."""
    jsonl(
        folder / "numina.jsonl",
        {"problem": "1+1?", "solution": r"It is \boxed{2}.", "answer": "2", "problem_type": "Algebra"},
        {"problem": "Prove it.", "solution": None, "answer": None, "problem_type": "Number Theory"},
        {"problem": "Prove that.", "solution": "Trivially.", "answer": "proof", "problem_type": "Inequalities"},
        {"problem": "Show it.", "solution": "By induction on n.", "answer": None, "problem_type": "Number Theory"},
        {"problem": r"Find $\frac12$ of 1.", "solution": "...", "answer": r"\frac{1}{2}", "problem_type": "Algebra"},
        {"problem": "", "solution": "...", "answer": "3", "problem_type": "Other"},
    )


def csv(folder: Path) -> None:
    """As Excel saves "CSV UTF-8": a mark first, cells with line ends in quotes, CRLF."""
    text = '\ufeffquestion,answer\r\n"Wie groß ist\n7+1?",8\r\n"Say ""5"".",5\r\n'
    (folder / "excel.csv").write_bytes(text.encode())


def saved(folder: Path) -> None:
    import datasets

    parts = {"train": datasets.Dataset.from_list(sums(10, 4)), "test": datasets.Dataset.from_list(sums(1, 1))}
    datasets.DatasetDict(parts).save_to_disk(folder / "saved")


def packed(folder: Path) -> None:
    import pyarrow

    (folder / "array.json.gz").write_bytes(gzip.compress(json.dumps(sums(20, 4)).encode()))
    (folder / "lines.jsonl.zst").write_bytes(pyarrow.compress(lines(*sums(30, 4)), codec="zstd", asbytes=True))


def parts(folder: Path) -> None:
    for part in range(3):
        jsonl(folder / f"part-{part}.jsonl", *sums(10 * part, 2))


def numbers(folder: Path) -> None:
    rows = [
        {"problem": "3.50?", "gold": Decimal("3.50"), "score": 18.0},
        {"problem": "72?", "gold": Decimal("72.00"), "score": 1e22},
    ]
    parquet(folder / "numbers.parquet", rows)


def gsm8k(folder: Path) -> None:
    jsonl(
        folder / "gsm8k.jsonl",
        {"question": "48+24?", "answer": "She sold 48/2 = <<48/2=24>>24 in May.\n#### 72"},
        {"question": "540*2?", "answer": "That is <<540*2=1080>>1,080.\n#### 1,080"},
    )


def file(path: str, **fields: Any) -> dict[str, Any]:
    return {"source": "file", "path": path, **fields}


INPUTS = {
    "dapo": Input(
        dapo,
        {"train": file("dapo.parquet", columns={"answer": "reward_model.ground_truth"}), "promptTemplate": "chat"},
        [
            "data      train: 3 problems",
            "prompt    row 0, 84 tokens, answer '34'",
            "          | <|im_start|>user",
            "          | Find x if x+3=37.<|im_end|>",
            "          | <|im_start|>assistant",
            r"reward    row 0: right answer '\\boxed{34}' scores 1 (accuracy 1)",
            r"reward    row 0: wrong answer '\\boxed{-7}' scores 0 (accuracy 0)",
        ],
    ),
    "numina": Input(
        numina,
        {"train": file("numina.jsonl", onBadRow="skip"), "promptTemplate": "noThink"},
        [
            "data      train: 2 problems; 2 left out: the answer is null; 1 left out: the answer says that there is no"
            " answer; 1 left out: the problem is empty",
            "          | 1+1? /no_think<|im_end|>",
            r"reward    row 0: wrong answer '\\boxed{\\frac{1}{2}}' scores 0 (accuracy 0)",
        ],
    ),
    "trl": Input(
        lambda folder: jsonl(
            folder / "trl.jsonl",
            {"prompt": [{"role": "system", "content": "Be kind."}, *chat("1+1?")], "solution": r"\boxed{2}"},
            {"prompt": chat("2+2?"), "solution": r"\boxed{4}"},
        ),
        {"train": file("trl.jsonl"), "promptTemplate": "chat", "systemPrompt": "Be brief."},
        [
            "data      train: 2 problems",
            "          | Be kind.<|im_end|>",  # its own system turn
            "          | Be brief.<|im_end|>",
            "prompt    row 1, 42 tokens, answer '4'",
        ],
    ),
    "open-r1": Input(
        lambda folder: jsonl(
            folder / "r1.jsonl",
            {"problem": "Half of 1?", "solution": r"Half, so $\boxed{\frac{1}{2}}$.", "source": "olympiads"},
            {"problem": "A third?", "solution": r"Thus $\boxed{\frac13}$.", "source": "olympiads"},
        ),
        {"train": file("r1.jsonl"), "promptTemplate": "think"},
        [
            r"prompt    row 0, 185 tokens, answer '\\frac{1}{2}'",
            r"reward    row 0: right answer '<think>\nLet me think about it.\n</think>\n\n\\boxed{\\frac{1}{2}}' scores 1",
        ],
    ),
    "csv": Input(
        csv,
        {"train": file("excel.csv"), "instruction": "Q: {problem}\nA:"},
        [
            "data      train: 2 problems",
            "          | Q: Wie groß ist",
            "          | 7+1?",
            "          | A:",
            "reward    row 1: right answer '8' scores 1 (accuracy 1)",  # the second line of the file
        ],
    ),
    "saved": Input(
        saved,
        {"train": file("saved"), "evals": [file("saved", label="held-out", split="test")]},
        ["data      train: 4 problems", "data      eval-held-out: 1 problems", "          | 10+10="],
    ),
    "json-array-gz": Input(
        packed, {"train": file("array.json.gz")}, ["data      train: 4 problems", "          | 20+20="]
    ),
    "jsonl-zst": Input(
        packed, {"train": file("lines.jsonl.zst")}, ["data      train: 4 problems", "          | 30+30="]
    ),
    "globbed": Input(
        parts,
        {"train": {"source": "file", "paths": ["part-[01].jsonl", "part-2.jsonl"]}},
        ["data      train: 6 problems", "          | 0+0=", "prompt    row 2, 6 tokens, answer '20'"],
    ),
    "mix": Input(
        parts,
        {
            "train": {
                "source": "mix",
                "mix": [
                    {"label": "built-in", "weight": 3.0, "arithmetic": {"digits": 1, "rows": 50}},
                    {"label": "files", **file("part-*.jsonl")},
                ],
            }
        },
        ["data      train: 56 problems", "prompt    row built-in/0, 4 tokens"],
        {"rollouts/by_set/built-in": 3, "rollouts/by_set/files": 1},
    ),
    "numbers": Input(
        numbers,
        {"train": file("numbers.parquet", columns={"answer": "gold"})},
        ["reward    row 0: right answer '3.50' scores 1", "reward    row 0: wrong answer '72' scores 0"],
    ),
    "gsm8k": Input(
        gsm8k,
        {"train": file("gsm8k.jsonl", columns={"answerPattern": "#### (.+)"})},
        ["reward    row 0: right answer '72' scores 1", "reward    row 0: wrong answer '1,080' scores 0"],
    ),
}


def exchange_for(folder: Path, data: Mapping[str, Any], **spec: Any) -> Exchange:
    """A run's folder, as `heterorl run` and `heterorl check` make it."""
    run = run_of(
        model={"dtype": "float32", "tiny": {"hiddenSize": 32, "numLayers": 1, "targetAccuracy": 0}},
        data=dict(data),
        algorithm={"groupSize": 2},
        generation={"maxPromptTokens": 512, "maxCompletionTokens": 4},
        learner={"steps": 2, "batch": {"groups": 4}},
        samplers=[{"name": "far", "engine": "transformers", "promptsPerBatch": 4}],
        exchange={"pollSeconds": 0.01},
        **spec,
    )
    run, _ = look(folder / "run.yaml", run, folder / "runs")
    exchange = Exchange(folder / "runs" / "test")
    exchange.create(run)
    return exchange


def checked(exchange: Exchange, capfd: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Exit code and output of a check."""
    capfd.readouterr()
    code = 0
    for module, programs in (("heterorl_learner", LEARNER), ("heterorl_sampler", SAMPLER)):
        code = code or perform(module, programs, ["check", "--root", str(exchange.root)], Stop())
    out, err = capfd.readouterr()
    return code, out + err


class Steps:
    """Keeps what the learner tells of each step."""

    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []

    def write(self, record: Mapping[str, Any]) -> None:
        if "step" in record:
            self.records.append(dict(record))

    def close(self) -> None:
        """Nothing to let go."""


def trained(exchange: Exchange) -> list[dict[str, Any]]:
    """Prepare and train, a sampler beside the learner; what the learner told of each step."""
    prepare(exchange)
    stop, steps = Stop(), Steps()
    engine = build_engine(exchange.model_dir, exchange.spec)  # transformers loads one model at a time
    sampler = threading.Thread(target=serve, args=(exchange, "far", 0, stop))
    sampler.start()
    try:
        assert Trainer(exchange, engine, Metrics([steps]), lambda: False).train()
    finally:
        stop.set()
        sampler.join()
    return steps.records


@pytest.mark.parametrize("name", INPUTS)
def test_an_input_is_shown_by_a_check_and_trained_on(
    name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    given = INPUTS[name]
    given.make(tmp_path)
    exchange = exchange_for(tmp_path, given.data)
    code, output = checked(exchange, capfd)
    assert code == 0, output
    found = output.splitlines()
    assert [line for line in given.says if not any(line == one or one.startswith(line) for one in found)] == [], output
    records = trained(exchange)
    assert [record["step"] for record in records] == [1, 2]
    assert {key: records[0][key] for key in given.metrics} == given.metrics


# ── what is refused ──────────────────────────────────────────────────────────────────────────────────────────────────
REFUSED: dict[str, tuple[Callable[[Path], object], dict[str, Any], str]] = {
    "proofs are rows without an answer": (
        numina,
        {"train": file("numina.jsonl")},
        "numina.jsonl: 4 of 6 rows cannot be used: line 2: the answer is null | line 3: the answer says that there is no"
        " answer: 'proof' | line 4: the answer is null | line 6: the problem is empty; correct or remove them",
    ),
    "no reference where verl has it": (
        dapo,
        {"train": file("dapo.parquet"), "promptTemplate": "chat"},
        "dapo.parquet: no column `answer` or `solution`; found: data_source, prompt, ability,"
        " reward_model.ground_truth, reward_model.style, extra_info.index (each of its 3 rows)",
    ),
    "a conversation and no chat template": (
        dapo,
        {"train": file("dapo.parquet", columns={"answer": "reward_model.ground_truth"})},
        "the prompt is a conversation, for which promptTemplate: raw has no turns; set chat (each of its 3 rows)",
    ),
    "a split that is not there": (
        saved,
        {"train": file("saved", split="validation")},
        "has no split validation; set split to one of train, test",
    ),
    "prompts that are all too long": (
        lambda folder: jsonl(folder / "long.jsonl", {"problem": "1+" * 300 + "1=", "answer": "301"}),
        {"train": file("long.jsonl")},
        "every prompt is longer than generation.maxPromptTokens 512; the shortest has 602 tokens",
    ),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_a_check_refuses_as_a_run_would(fault: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    make, data, message = REFUSED[fault]
    make(tmp_path)
    code, output = checked(exchange_for(tmp_path, data), capfd)
    assert code == 2
    (line,) = [line for line in output.splitlines() if " error: " in line]
    assert message in line
    assert "Traceback" not in output


def test_a_reward_that_cannot_be_imported_is_the_users_error_of_a_check(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    jsonl(tmp_path / "a.jsonl", *sums(1, 4))
    (tmp_path / "own_rewards_of_a_check.py").write_text("import os\n\nKEY = os.environ['NO_SUCH_KEY_HERE']\n")
    monkeypatch.syspath_prepend(tmp_path)
    own = {"name": "custom", "path": "own_rewards_of_a_check.brevity"}
    code, output = checked(exchange_for(tmp_path, {"train": file("a.jsonl")}, rewards=[own]), capfd)
    assert code == 2
    assert "custom reward own_rewards_of_a_check.brevity cannot be imported: KeyError: 'NO_SUCH_KEY_HERE'" in output
    assert "own_rewards_of_a_check.py, line 3" in output


def test_a_stop_token_that_the_model_does_not_have_is_refused(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    jsonl(tmp_path / "a.jsonl", *sums(1, 4))
    exchange = exchange_for(tmp_path, {"train": file("a.jsonl")})
    run = exchange.run.model_copy(deep=True)
    tree = run.resolved()
    tree["spec"]["generation"]["stopTokenIds"] = [259]
    exchange.create(type(run).model_validate(tree))
    code, output = checked(exchange, capfd)
    assert code == 2
    assert "generation.stopTokenIds: the model has no token 259; its tokens are 0 to 258" in output
