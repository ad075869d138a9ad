"""Where the cluster's programs come from."""

from __future__ import annotations

import shutil

import pytest

from cluster import build
from cluster.harness import Unavailable, find_programs


def program(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return path


@pytest.fixture(autouse=True)
def empty_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("KUBEBUILDER_ASSETS", raising=False)


def test_a_built_program_is_found_in_the_cache(tmp_path):
    assert build.find("etcd") is None
    built = program(build.bin_folder() / "etcd")
    assert built.is_relative_to(tmp_path / "cache" / "heterorl")
    assert build.find("etcd") == built


def test_a_program_in_kubebuilder_assets_goes_first(monkeypatch, tmp_path):
    built, given = program(build.bin_folder() / "etcd"), program(tmp_path / "assets" / "etcd")
    monkeypatch.setenv("KUBEBUILDER_ASSETS", str(given.parent))
    assert build.find("etcd") == given
    given.chmod(0o644)
    assert build.find("etcd") == built


def test_another_version_goes_to_another_folder(monkeypatch, tmp_path):
    copy = tmp_path / "modules"
    for module in build.PROGRAMS:
        shutil.copytree(build.HERE / module, copy / module)
    before = build.bin_folder()
    monkeypatch.setattr(build, "HERE", copy)
    assert build.bin_folder() == before
    sums = copy / "tools" / "go.sum"
    sums.write_text(sums.read_text().replace("h1:", "h1:x", 1))
    assert build.bin_folder() != before


def test_what_is_missing_is_named_with_the_command_that_builds_it():
    with pytest.raises(Unavailable, match=r"not built: etcd, kube-apiserver, kubectl; build with: python .*build\.py"):
        find_programs("apiserver")


def test_building_without_go_says_what_to_install(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert build.main(["pause"]) == 1
    assert "install Go" in capsys.readouterr().err


def test_an_unknown_program_is_a_usage_error(capsys):
    assert build.main(["kubectll"]) == 2
    assert "known are etcd" in capsys.readouterr().err
