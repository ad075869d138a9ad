"""What rewards read of a completion, and of the turn that its chat template opened."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from heterorl_sampler.scoring import Decoder


def tokenizer(*special: str, **named: str) -> PreTrainedTokenizerFast:
    """One token a byte, with these special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=backend, **named)
    made.add_tokens([AddedToken(content, special=True) for content in special])
    return made


TAGS = ("<think>", "</think>", "<answer>", "</answer>", "<|im_end|>", "<start_of_turn>")


def said(text: str, made: PreTrainedTokenizerFast) -> str:
    return Decoder(made).text(made(text, add_special_tokens=False).input_ids)


def opened(text: str, made: PreTrainedTokenizerFast, prompt: Any = "2+2=") -> str:
    return Decoder(made).opened({"prompt": prompt, "prompt_ids": made(text, add_special_tokens=False).input_ids})


@pytest.mark.parametrize("tags", [(), TAGS])
def test_tags_survive_whether_or_not_they_are_special_tokens(tags: tuple[str, ...]) -> None:
    text = "<think>\na </think> , <answer>4</answer>"
    made = tokenizer(*tags, eos_token="</s>", bos_token="<s>", pad_token="<pad>")
    assert said(text, made) == text


def test_what_ends_pads_or_steers_does_not_survive() -> None:
    made = tokenizer(*TAGS, eos_token="</s>", bos_token="<s>", pad_token="<pad>", unk_token="<unk>")
    assert said("<s><start_of_turn>4<|im_end|></s><pad><pad>", made) == "4"


@pytest.mark.parametrize("tags", [(), TAGS])
@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("2+2=<|im_end|>assistant\n<think>\n", "<think>\n"),
        ("2+2=<|im_end|>assistant\n<think>", "<think>"),
        ("2+2=<|im_end|>assistant\n<think>\n\n</think>\n\n", "<think>\n\n</think>\n\n"),
        ("2+2=<|im_end|>assistant\n<think></think>", "<think></think>"),
        ("2+2=<|im_end|>assistant\n", ""),
        ("is <think> a tag?<|im_end|>assistant\n", ""),
        ("<think>\na</think>\n", ""),  # a thought of an earlier turn
    ],
)
def test_the_turn_begins_with_what_the_template_has_opened(tags: tuple[str, ...], prompt: str, expected: str) -> None:
    assert opened(prompt, tokenizer(*tags)) == expected


def test_a_conversation_that_ends_in_the_models_turn_is_continued() -> None:
    prompt = [{"role": "user", "content": "2+2="}, {"role": "assistant", "content": "<think>\nTwo and"}]
    assert opened("2+2=<think>\nTwo and", tokenizer(), prompt) == "<think>\nTwo and"
