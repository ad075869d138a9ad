"""Versions and the commit: a checkout, a worktree, packed references, and no checkout at all."""

from importlib.metadata import version

from heterorl.monitoring.software import commit_of, software

ONE, TWO = "a" * 40, "b" * 40


def test_the_versions_that_decide_a_result_are_known():
    found = software()
    assert found["torch"] == version("torch")
    assert found["python"].startswith("3.")


def test_a_commit_is_read_from_a_branch_a_packed_branch_and_a_detached_head(tmp_path):
    git = tmp_path / ".git"
    (git / "refs" / "heads").mkdir(parents=True)
    (git / "HEAD").write_text("ref: refs/heads/main\n")
    (git / "packed-refs").write_text(f"# pack-refs\n{TWO} refs/heads/main\n{ONE} refs/heads/other-main\n")
    assert commit_of(tmp_path) == TWO
    (git / "refs" / "heads" / "main").write_text(ONE + "\n")
    assert commit_of(tmp_path) == ONE
    (git / "HEAD").write_text(TWO + "\n")
    assert commit_of(tmp_path) == TWO


def test_a_commit_of_a_worktree_is_read_from_the_repository_that_it_belongs_to(tmp_path):
    git = tmp_path / "main" / ".git"
    own = git / "worktrees" / "u"
    (git / "refs" / "heads").mkdir(parents=True)
    own.mkdir(parents=True)
    (git / "refs" / "heads" / "side").write_text(ONE + "\n")
    (own / "HEAD").write_text("ref: refs/heads/side\n")
    (own / "commondir").write_text("../..\n")
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / ".git").write_text(f"gitdir: {own}\n")
    assert commit_of(tree) == ONE


def test_a_folder_that_is_no_checkout_has_no_commit(tmp_path):
    assert commit_of(tmp_path) is None
