import pytest

from heterorl.data.prompts import NO_THINK, THINK, Template, render, require_usable
from heterorl.errors import ModelError
from heterorl.spec.run import DataSpec

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


def rendered(tokenizer, template: Template, prompt) -> str:
    return tokenizer.decode(render(template, tokenizer, prompt))


def chatml(*turns: tuple[str, str]) -> str:
    opened = "" if turns[-1][0] == "assistant" else "<|im_start|>assistant\n"
    text = "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in turns)
    return text.removesuffix("<|im_end|>\n") if not opened else text + opened


def test_chat_is_the_problem_alone_as_the_users_turn(tokenizer) -> None:
    tokenizer.chat_template = CHATML
    assert rendered(tokenizer, Template.named("chat"), "1+1?") == chatml(("user", "1+1?"))


def test_texts_of_ones_own_replace_those_of_the_template(tokenizer) -> None:
    tokenizer.chat_template = CHATML
    instruction = r"Solve {problem} and write \boxed{} {x}."
    both = Template.named("think", system="Be brief.", instruction=instruction)
    user = ("user", r"Solve {1+1}? and write \boxed{} {x}.")
    assert rendered(tokenizer, both, "{1+1}?") == chatml(("system", "Be brief."), user)
    assert rendered(tokenizer, Template.named("noThink", system=""), "1+1?") == chatml(("user", "1+1? /no_think"))
    assert rendered(tokenizer, Template.named("raw", instruction="Q: {problem}\nA:"), "1+1?") == "Q: 1+1?\nA:"


def test_the_texts_of_a_run_are_those_of_its_data(tokenizer) -> None:
    tokenizer.chat_template = CHATML
    data = DataSpec(prompt_template="chat", system_prompt="Be brief.", instruction="{problem} Go.")
    assert rendered(tokenizer, Template.of(data), "1+1?") == chatml(("system", "Be brief."), ("user", "1+1? Go."))


def test_a_conversation_keeps_its_turns_and_takes_the_texts_where_it_has_none(tokenizer) -> None:
    tokenizer.chat_template = CHATML
    talk = [("user", "1+1?"), ("assistant", "2"), ("user", "2+2?")]
    conversation = [{"role": role, "content": content} for role, content in talk]
    assert rendered(tokenizer, Template.named("chat"), conversation) == chatml(*talk)
    own = Template.named("chat", system="Be brief.", instruction="{problem} Go.")
    assert rendered(tokenizer, own, conversation) == chatml(("system", "Be brief."), *talk[:2], ("user", "2+2? Go."))
    with_system = [{"role": "system", "content": "Be kind."}, *conversation]
    assert rendered(tokenizer, Template.named("think"), with_system) == chatml(("system", "Be kind."), *talk)
    assert conversation[-1]["content"] == "2+2?"  # left as it was


def test_a_conversation_that_ends_with_the_assistant_is_continued(tokenizer) -> None:
    tokenizer.chat_template = CHATML
    conversation = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "It is"}]
    assert rendered(tokenizer, Template.named("chat"), conversation) == chatml(("user", "1+1?"), ("assistant", "It is"))


BROKEN = {
    "no default": {"tools": CHATML, "rag": CHATML},
    "division by zero": "{{ 1 // 0 }}{{ messages[0].content }}",
    "prints nothing": "{% for message in messages %}{% endfor %}",
    "prints the same": "{% for message in messages %}<|im_start|>{% endfor %}",
    "syntax": "{% for message in messages %}{{ message.content }",
    "refuses": "{{ raise_exception('Conversation roles must\nalternate') }}",
    "undefined": "{{ messages[0].parts.first.text }}",
    "a filter of another library": "{{ messages[0].content | from_json }}",
    "endless": "{% for i in range(10**12) %}{{ i }}{% endfor %}",
    "wrong type": "{{ messages[0].content + 1 }}",
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_chat_template_is_one_line_that_says_what_to_do(tokenizer, fault: str) -> None:
    tokenizer.chat_template = BROKEN[fault]
    with pytest.raises(ModelError) as error:
        require_usable(Template.named("chat"), tokenizer)
    said = str(error.value)
    assert "\n" not in said
    assert "chat template" in said
    assert said.endswith(
        "correct the chat template in the model's folder (chat_template.jinja or tokenizer_config.json), set"
        " data.promptTemplate: raw, or use another model"
    )


def test_a_template_that_takes_no_system_turn_is_told_with_the_way_to_leave_it_out(tokenizer) -> None:
    tokenizer.chat_template = "{{ raise_exception('no system') if messages[0].role == 'system' }}" + CHATML
    with pytest.raises(ModelError, match=r"no system\), set data\.systemPrompt: '' if it takes no system turn"):
        require_usable(Template.named("think"), tokenizer)
    require_usable(Template.named("think", system=""), tokenizer)
