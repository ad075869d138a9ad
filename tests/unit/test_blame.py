"""Whose failure an exception is."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from heterorl.blame import explain
from heterorl.errors import CorruptFile, DataError, SiteError, UserError


def os_error(number: int, filename: Path | None = None) -> OSError:
    return OSError(number, os.strerror(number), *([str(filename)] if filename else []))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_no_space_is_the_users_on_the_volume_and_the_nodes_elsewhere(tmp_path, number):
    on_volume = explain(os_error(number, tmp_path / "run" / "weights" / "x"), tmp_path / "run")
    assert isinstance(on_volume, UserError)
    assert "--resume" in str(on_volume)
    assert isinstance(explain(os_error(number, tmp_path / "scratch"), tmp_path / "run"), SiteError)


def test_a_write_that_names_no_file_is_the_volumes_unless_the_nodes_own_disk_is_full(tmp_path, monkeypatch):
    assert isinstance(explain(os_error(errno.ENOSPC), tmp_path), UserError)
    full = os.statvfs_result((4096, 4096, 100, 0, 0, 9, 9, 9, 0, 255))
    room = os.statvfs_result((4096, 4096, 99999, 99999, 99999, 9, 9, 9, 0, 255))
    monkeypatch.setattr("os.statvfs", lambda folder: room if folder == tmp_path else full)
    assert isinstance(explain(os_error(errno.ENOSPC), tmp_path), SiteError)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        os_error(errno.ENOMEM),
        os_error(errno.EMFILE),
        RuntimeError("No CUDA GPUs are available"),
        RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB"),
        RuntimeError("CUDA error: uncorrectable ECC error encountered\nCompile with ..."),
        RuntimeError("Found no NVIDIA driver on your system."),
        ValueError("Free memory on device cuda:0 (3.1/79.1 GiB) on startup is less than desired"),
    ],
)
def test_memory_and_devices_are_the_nodes(tmp_path, error):
    found = explain(error, tmp_path)
    assert isinstance(found, SiteError)
    assert found.exit_code == 3
    assert "\n" not in str(found)


def test_the_cause_of_an_exception_counts(tmp_path):
    wrapped = RuntimeError("Engine core initialization failed")
    wrapped.__cause__ = RuntimeError("No CUDA GPUs are available")
    assert isinstance(explain(wrapped, tmp_path), SiteError)


@pytest.mark.parametrize(("error", "code"), [(DataError("row 3"), 2), (CorruptFile("x"), 1), (SiteError("clock"), 3)])
def test_our_own_errors_are_what_their_class_says(tmp_path, error, code):
    assert explain(error, tmp_path) is error
    assert error.exit_code == code


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT])
def test_a_volume_that_is_out_of_reach_is_the_nodes(tmp_path, number):
    named, unnamed = (explain(os_error(number, file), tmp_path) for file in (tmp_path / "weights", None))
    assert isinstance(named, SiteError)
    assert str(named) == f"{tmp_path / 'weights'} is out of reach of this node ({os.strerror(number)})"
    assert str(unnamed) == f"{tmp_path} is out of reach of this node ({os.strerror(number)})"


@pytest.mark.parametrize("error", [ZeroDivisionError(), os_error(errno.EISDIR), RuntimeError("shapes do not match")])
def test_all_others_are_crashes(tmp_path, error):
    assert explain(error, tmp_path) is None
