import ast
import re
from pathlib import Path

import yaml

from heterorl.spec.base import Block, block_in
from heterorl.spec.crd import crd_yaml
from heterorl.spec.reference import spec_markdown
from heterorl.spec.run import HeteroRLRun
from heterorl.spec.status import RunStatus

ROOT = Path(__file__).parents[2]


def blocks(block: type[Block]):
    yield block
    for info in block.model_fields.values():
        if inner := block_in(info.annotation):
            yield from blocks(inner)


def test_committed_spec_reference_is_what_the_spec_says():
    assert (ROOT / "docs/spec.md").read_text() == spec_markdown(), "run `heterorl docs`"


def test_committed_crd_is_what_the_spec_says():
    assert (ROOT / "crds/heterorlrun.yaml").read_text() == crd_yaml(), "run `heterorl crd`"


def test_every_block_and_field_has_a_sentence_that_ends():
    for block in {*blocks(HeteroRLRun), *blocks(RunStatus)}:
        assert (block.__doc__ or "").strip().endswith((".", ")")), block
        for name, info in block.model_fields.items():
            assert (info.description or "").strip().endswith("."), f"{block.__name__}.{name}"


def test_every_field_of_the_spec_stands_in_the_reference_under_its_yaml_name():
    text = spec_markdown()
    for block in blocks(HeteroRLRun):
        section = text.split(f"### {block.__name__}\n")[1].split("\n### ")[0]
        for name, info in block.model_fields.items():
            assert f"| `{info.alias or name}` |" in section


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_every_manifest_in_the_docs_is_valid():
    shown = [
        (page.name, document)
        for page in PAGES
        for block in re.findall(r"^```yaml\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
        for document in yaml.safe_load_all(block)
    ]
    runs = [(page, document) for page, document in shown if document.get("kind") == "HeteroRLRun"]
    assert len(runs) >= 4
    for page, document in runs:
        assert HeteroRLRun.model_validate(document).metadata.name, page


def test_links_between_the_pages_lead_to_pages_and_their_headings():
    for page in PAGES:
        for target, anchor in re.findall(r"\]\(([\w./-]*\.md)?(#[\w-]+)?\)", page.read_text()):
            found = (page.parent / target).resolve() if target else page
            assert found.exists(), f"{page.name}: {target}"
            headings = re.findall(r"^#+ (.+)$", found.read_text(), re.MULTILINE)
            slugs = {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}
            assert not anchor or anchor[1:] in slugs, f"{page.name}: {target}{anchor}"


def test_links_of_the_reference_lead_to_its_sections():
    text = spec_markdown()
    sections = {title.lower() for title in re.findall(r"^### (\w+)$", text, re.MULTILINE)}
    assert set(re.findall(r"\(#(\w+)\)", text)) <= sections


PLACES = [ROOT, *(ROOT / "images").iterdir(), ROOT / "operator"]
"""Where a path named in the pages may start."""


def test_paths_named_in_the_pages_exist():
    named = re.compile(
        r"(?<![\w./-])((?:charts|crds|docs|examples|images|operator|tests)/[\w./*-]*[\w*/]|heterorl(?:_\w+)?/[\w./]+\.py)"
    )
    missing = [
        f"{page.name}: {path}"
        for page in PAGES
        for path in sorted(set(named.findall(page.read_text())))
        if not any(any(place.glob(path)) for place in PLACES)
    ]
    assert missing == []


def test_the_ways_in_the_architecture_name_functions_that_exist_in_at_most_twelve_places():
    page = (ROOT / "docs/architecture.md").read_text()
    ways = re.findall(r"^## The way of [^\n]+\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL)
    assert len(ways) == 4
    for way in ways:
        assert 1 < len(re.findall(r"^\d+\. ", way, re.MULTILINE)) <= 12
        for path, name in re.findall(r"`(heterorl\w*/[\w/]+\.py)` `([\w.]+)`", way):
            (file,) = (place / path for place in PLACES if (place / path).exists())
            body: list[ast.stmt] = ast.parse(file.read_text()).body
            for part in name.split("."):
                found = [node for node in body if getattr(node, "name", None) == part]
                assert found, f"{path} has no {name}"
                body = getattr(found[0], "body", [])
    modules = [re.findall(r"\w+\.py", place) for place in re.findall(r"^\d+\. .*", ways[0], re.MULTILINE)]
    assert all(len(named) == 1 for named in modules), "a place of the way of a rollout is one module"
