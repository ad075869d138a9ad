import pytest

from heterorl.data.prompts import NO_THINK, THINK, Template, render
from heterorl.errors import ModelError

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    """A byte tokenizer: what it decodes is exactly what it was given."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = Tokenizer(models.BPE({character: i for i, character in enumerate(alphabet)}, []))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    words.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=words, clean_up_tokenization_spaces=False)


def test_think_asks_to_reason_and_to_box_and_opens_the_assistants_turn(tokenizer) -> None:
    tokenizer.chat_template = CHATML
    assert tokenizer.decode(render(Template.named("think"), tokenizer, "1+1?")) == (
        f"<|im_start|>system\n{THINK}<|im_end|>\n<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert "step by step" in THINK
    assert r"\boxed{}" in THINK


def test_no_think_asks_for_the_box_only_and_ends_with_the_switch(tokenizer) -> None:
    tokenizer.chat_template = CHATML
    assert tokenizer.decode(render(Template.named("noThink"), tokenizer, "1+1?")) == (
        f"<|im_start|>system\n{NO_THINK}<|im_end|>\n<|im_start|>user\n1+1? /no_think<|im_end|>\n<|im_start|>assistant\n"
    )
    assert "step" not in NO_THINK
    assert r"\boxed{}" in NO_THINK


def test_raw_is_the_problem_alone_and_needs_no_chat_template(tokenizer) -> None:
    tokenizer.chat_template = None
    ids = render(Template.named("raw"), tokenizer, "12+34=")
    assert tokenizer.decode(ids) == "12+34="
    assert all(type(token) is int for token in ids)


@pytest.mark.parametrize("template", ["think", "noThink"])
def test_a_tokenizer_without_a_chat_template_is_refused_with_the_way_out(tokenizer, template) -> None:
    tokenizer.chat_template = None
    with pytest.raises(ModelError, match="no chat template; set promptTemplate: raw"):
        render(Template.named(template), tokenizer, "1+1?")


def test_a_chat_template_that_refuses_the_system_turn_is_named(tokenizer) -> None:
    tokenizer.chat_template = "{{ raise_exception('System role not supported') }}"
    with pytest.raises(ModelError, match=r"System role not supported.*promptTemplate: raw"):
        render(Template.named("think"), tokenizer, "1+1?")
