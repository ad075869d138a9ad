r"""From a problem's text to the prompt's token ids, through the tokenizer's own chat template.

think and noThink both ask for the answer in a `\boxed{}`; think asks to reason first, noThink ends the user's turn with
Qwen3's switch `/no_think`. raw is the problem's text alone, for models without a chat template.
"""

from __future__ import annotations

from typing import Any, Literal

from heterorl.errors import ModelError

Template = Literal["think", "noThink", "raw"]

THINK = (
    "Think about the problem step by step between <think> and </think>. "
    r"After that, give the solution briefly and put the final answer within \boxed{}."
)
NO_THINK = r"Put the final answer within \boxed{}."


def messages(template: Template, problem: str) -> list[dict[str, str]]:
    """The conversation that a chat template turns into a prompt (think and noThink)."""
    system, user = (THINK, problem) if template == "think" else (NO_THINK, f"{problem} /no_think")
    return [{"role": "system", "content": system}, {"role": "user", "content": user}]


def render(template: Template, tokenizer: Any, problem: str) -> list[int]:
    """Token ids of the prompt, the assistant's turn opened; `tokenizer` is a transformers tokenizer.

    Raises `ModelError` when the template needs a chat template that the tokenizer does not have, or that refuses it.
    """
    if template == "raw":
        return list(tokenizer.encode(problem))
    if not tokenizer.chat_template:
        raise ModelError(
            f"data.promptTemplate is {template}, but the model's tokenizer has no chat template;"
            " set promptTemplate: raw, or use a model that was trained to chat"
        )
    from jinja2 import TemplateError

    try:
        ids = tokenizer.apply_chat_template(
            messages(template, problem), add_generation_prompt=True, tokenize=True, return_dict=False
        )
    except TemplateError as error:
        raise ModelError(
            f"data.promptTemplate is {template}, but the tokenizer's chat template rejects a system and a user turn"
            f" ({error}); set promptTemplate: raw, or use another model"
        ) from error
    return list(ids)
