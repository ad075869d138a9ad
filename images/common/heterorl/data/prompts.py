r"""From a problem, or a conversation, to the prompt's token ids, through the tokenizer's own chat template.

    chat      the problem as the user's turn
    think     asks to reason first and to answer in a `\boxed{}`
    noThink   asks for the box only; the user's turn ends with Qwen3's switch `/no_think`
    raw       the text alone, for models without a chat template

A text of the run's own replaces that of the template. A conversation keeps its turns: a system turn is put before it if
it has none, and the last user's turn takes the place of the problem.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

from heterorl.data.files import first_line
from heterorl.errors import ModelError
from heterorl.spec.run import DataSpec, PromptTemplate

Message = dict[str, Any]
Prompt = str | list[Message]
"""The text of a problem, or the turns of a conversation, each with `role` and `content`."""

THINK = (
    "Think about the problem step by step between <think> and </think>. "
    r"After that, give the solution briefly and put the final answer within \boxed{}."
)
NO_THINK = r"Put the final answer within \boxed{}."
PROBLEM = "{problem}"
_SYSTEM: dict[PromptTemplate, str] = {"think": THINK, "noThink": NO_THINK}
_INSTRUCTION: dict[PromptTemplate, str] = {"noThink": f"{PROBLEM} /no_think"}


@dataclass(frozen=True)
class Template:
    """What stands around a problem."""

    name: PromptTemplate
    system: str
    """Text of the system turn; none where it is empty."""
    instruction: str
    """Text of the user's turn, with `{problem}` in it."""

    @classmethod
    def named(cls, name: PromptTemplate, *, system: str | None = None, instruction: str | None = None) -> Self:
        """A template, with texts of one's own where they are given."""
        own = (_SYSTEM.get(name, "") if system is None else system, instruction or _INSTRUCTION.get(name, PROBLEM))
        return cls(name, *own)

    @classmethod
    def of(cls, data: DataSpec) -> Self:
        """That of a run."""
        return cls.named(data.prompt_template, system=data.system_prompt, instruction=data.instruction)

    def text(self, problem: str) -> str:
        """The user's turn; a plain replacement, as instructions are full of braces."""
        return self.instruction.replace(PROBLEM, problem)

    def messages(self, prompt: Prompt) -> list[Message]:
        """The conversation that a chat template turns into a prompt."""
        if isinstance(prompt, str):
            turns = [{"role": "user", "content": self.text(prompt)}]
        else:
            last = max((i for i, turn in enumerate(prompt) if turn["role"] == "user"), default=-1)
            turns = [
                {**turn, "content": self.text(turn["content"])} if i == last else turn for i, turn in enumerate(prompt)
            ]
        has_system = turns[0]["role"] in ("system", "developer")
        return turns if has_system or not self.system else [{"role": "system", "content": self.system}, *turns]


def render(template: Template, tokenizer: Any, prompt: Prompt) -> list[int]:
    """Token ids of the prompt, the assistant's turn opened, or left open where the conversation ends in one.

    `tokenizer` is a transformers tokenizer. Raises `ModelError` when the template needs a chat template that the
    tokenizer does not have, or that fails.
    """
    if template.name == "raw":
        if not isinstance(prompt, str):
            raise ModelError("the prompt is a conversation, for which promptTemplate: raw has no turns; set chat")
        ids = list(tokenizer.encode(template.text(prompt)))
    else:
        ids = _through_chat_template(template, tokenizer, prompt)
    if not ids:
        raise ModelError("the prompt has no tokens" + ("" if template.name == "raw" else _WAYS_OUT))
    return ids


_WAYS_OUT = (
    "; correct the chat template in the model's folder (chat_template.jinja or tokenizer_config.json), set"
    " data.promptTemplate: raw, or use another model"
)


def _through_chat_template(template: Template, tokenizer: Any, prompt: Prompt) -> list[int]:
    if not tokenizer.chat_template:
        raise ModelError(
            f"data.promptTemplate is {template.name}, but the model's tokenizer has no chat template;"
            " set promptTemplate: raw, or use a model that was trained to chat"
        )
    turns = template.messages(prompt)
    opened = turns[-1]["role"] == "assistant"
    try:
        ids = tokenizer.apply_chat_template(
            turns, add_generation_prompt=not opened, continue_final_message=opened, tokenize=True, return_dict=False
        )
    except Exception as error:  # a template is a program: there is nothing that it may not raise
        roles = ", ".join(turn["role"] for turn in turns)
        no_system = ", set data.systemPrompt: '' if it takes no system turn" if turns[0]["role"] == "system" else ""
        raise ModelError(
            f"the tokenizer's chat template fails on turns of {roles} ({type(error).__name__}: {first_line(error)})"
            f"{no_system}{_WAYS_OUT}"
        ) from error
    return list(ids)


def require_usable(template: Template, tokenizer: Any) -> None:
    """`ModelError` unless a problem can be put through the template and leaves a trace in what comes out."""
    if template.name != "raw" and render(template, tokenizer, "1+1=") == render(template, tokenizer, "2+2="):
        raise ModelError(f"the tokenizer's chat template prints the same for every problem{_WAYS_OUT}")
