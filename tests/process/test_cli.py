import pytest

from heterorl.cli import main


def test_eval_passes_its_arguments_on(capfd):
    with pytest.raises(SystemExit) as ended:
        main(["eval", "--help"])
    assert ended.value.code == 0
    assert "--data" in capfd.readouterr().out
