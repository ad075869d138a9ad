import re
from pathlib import Path

from heterorl.block import Block, block_in
from heterorl.crd import crd_yaml
from heterorl.spec import HeteroRLRun
from heterorl.spec_docs import spec_markdown
from heterorl.status import RunStatus

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


def test_links_of_the_reference_lead_to_its_sections():
    text = spec_markdown()
    sections = {title.lower() for title in re.findall(r"^### (\w+)$", text, re.MULTILINE)}
    assert set(re.findall(r"\(#(\w+)\)", text)) <= sections
