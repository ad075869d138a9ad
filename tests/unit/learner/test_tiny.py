import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from heterorl.spec.run import TinyModelSpec
from heterorl_learner.tiny import Example, _split, accuracy, build_model, build_tokenizer, examples_from, supervise


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


def sums(tokenizer, digits=1):
    """All a+b= of that many digits as examples."""
    pairs = [(a, b) for a in range(10**digits) for b in range(10**digits)]
    rows = [{"prompt_ids": tokenizer.encode(f"{a}+{b}="), "answer": str(a + b)} for a, b in pairs]
    return examples_from(rows, tokenizer, boxed=False)


def tiny(**fields):
    return TinyModelSpec(hidden_size=32, num_layers=1, supervised_learning_rate=1e-2, **fields)


@pytest.mark.parametrize("text", ["12+34=", " two  spaces\n\ttabs ", "Größe ≤ 7 🙂 \\boxed{½}", ""])
def test_any_text_survives_the_tokenizer_with_one_token_a_byte(tokenizer, text):
    ids = tokenizer.encode(text)
    assert len(ids) == len(text.encode())
    assert tokenizer.decode(ids) == text


def test_special_tokens_are_one_token_each_and_skipped_on_request(tokenizer):
    ids = tokenizer.encode("7<|im_end|>")
    assert ids[1:] == [tokenizer.eos_token_id]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "7"


def test_chat_template_ends_where_the_assistant_begins(tokenizer):
    text = tokenizer.apply_chat_template(
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1="}],
        add_generation_prompt=True,
        tokenize=False,
    )
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n1+1=<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize("tied", [True, False])
def test_saved_folder_loads_with_from_pretrained_and_computes_the_same(tmp_path, tokenizer, tied):
    model = build_model(tiny(tie_embeddings=tied), tokenizer)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.tensor([AutoTokenizer.from_pretrained(tmp_path).encode("12+34=46")])
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert loaded.config.architectures == ["Qwen3ForCausalLM"]
    assert loaded.config.head_dim == 32
    assert loaded.config.vocab_size == 320  # 256 bytes + 3 special tokens, up to the next multiple of 64
    assert loaded.config.tie_word_embeddings is tied
    ends = AutoTokenizer.from_pretrained(tmp_path).convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert loaded.generation_config.eos_token_id == ends


def test_same_seed_gives_the_same_weights_and_leaves_the_global_generator_alone(tokenizer):
    state = torch.get_rng_state()
    first, second, other = (build_model(tiny(seed=seed), tokenizer) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.model.embed_tokens.weight, second.model.embed_tokens.weight)
    assert not torch.equal(first.model.embed_tokens.weight, other.model.embed_tokens.weight)


def test_boxed_targets_are_what_the_boxed_templates_ask_for(tokenizer):
    [example] = examples_from([{"prompt_ids": [1], "answer": "46"}], tokenizer, boxed=True)
    assert tokenizer.decode(example.target_ids) == "\\boxed{46}<|im_end|>"


def test_accuracy_is_the_mean_probability_of_the_whole_target(tokenizer):
    model = build_model(tiny(), tokenizer)
    examples = [Example([5, 6, 7], [8, 9]), Example([5], [8]), Example([1, 2], [3, 4, 5])]
    expected = 0.0
    for example in examples:  # one text at a time, one token at a time, no padding
        context, logp = list(example.prompt_ids), 0.0
        for token in example.target_ids:
            logp += model(torch.tensor([context])).logits[0, -1].double().log_softmax(0)[token].item()
            context.append(token)
        expected += math.exp(logp) / len(examples)
    assert accuracy(model, examples) == pytest.approx(expected, rel=1e-4)


def test_supervision_stops_once_the_target_is_passed_and_repeats_with_its_seed(tokenizer):
    wanted = tiny(seed=1, target_accuracy=0.03, max_supervised_steps=400)
    models = [build_model(wanted, tokenizer) for _ in range(2)]
    outcomes = [supervise(model, sums(tokenizer), wanted) for model in models]
    assert outcomes[0] == outcomes[1]
    assert 0.03 <= outcomes[0].accuracy < 0.5
    assert outcomes[0].steps < 400
    assert torch.equal(models[0].model.embed_tokens.weight, models[1].model.embed_tokens.weight)


def test_supervision_says_so_when_the_target_is_out_of_reach(tokenizer, caplog):
    wanted = tiny(target_accuracy=0.9, max_supervised_steps=2)
    assert supervise(build_model(wanted, tokenizer), sums(tokenizer), wanted).steps == 2
    assert "below model.tiny.targetAccuracy 0.9" in caplog.text


def test_target_zero_leaves_the_weights_as_they_are(tokenizer):
    wanted = tiny(target_accuracy=0)
    model = build_model(wanted, tokenizer)
    before = model.model.embed_tokens.weight.clone()
    assert supervise(model, sums(tokenizer), wanted).steps == 0
    assert torch.equal(model.model.embed_tokens.weight, before)


def test_repeated_problems_are_never_on_both_sides_of_the_split():
    examples = [Example([n % 40], [n]) for n in range(200)]  # 40 prompts, each 5 times
    train, held_out = _split(examples, seed=0)
    assert len(held_out) == 40 // 8 * 5
    assert len(train) + len(held_out) == 200
    assert not {tuple(e.prompt_ids) for e in train} & {tuple(e.prompt_ids) for e in held_out}
