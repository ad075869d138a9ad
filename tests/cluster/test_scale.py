"""Many runs, as `make bench-operator` measures them: its targets for a thousand, held by a hundred.

The ratio to the bare loop is judged by the benchmark alone: here the operator's start would weigh too much in it.
"""

from __future__ import annotations

from bench import operator_scale


def test_a_hundred_runs_are_made_kept_and_found_again(needs, capsys):
    needs("kwok")
    result = operator_scale.measure(100, rest_s=15)
    with capsys.disabled():
        print(f"\n{operator_scale.table([result])}")
    assert result.writes_per_minute == 0
    assert result.p99_s < 2
    assert result.memory < 200e6
    assert result.synced_s < 45
