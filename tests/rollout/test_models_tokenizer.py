"""The small models' tokenizer: exact text both ways, LLaDA's special tokens and template, no network."""

import socket

import pytest

from rollout.models.encoding import encode_prompt, load_tokenizer
from rollout.models.tokenizer import CHARACTERS, SPECIAL, WORDS, build_tokenizer

PUZZLE = [{"role": "user", "content": "Puzzle: 0321003004002100"}]


@pytest.fixture(params=["built", "loaded"])
def tokenizer(request, tmp_path, monkeypatch):
    built = build_tokenizer()
    if request.param == "built":
        return built
    built.save_pretrained(tmp_path)
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("the tokenizer went to the network"))
    return load_tokenizer(tmp_path)


def test_text_comes_back_as_it_was(tokenizer):
    for text in ("".join(CHARACTERS), "".join(WORDS), "a  b <answer>1 + 2\n\n\n</answer> .", "Puzzle: users Target: 3"):
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


@pytest.mark.parametrize("text", ["a <|mdm_mask|> b", "<|eot_id|>", "x<|eot_id|><|endoftext|>y", "\ue000<|mdm_mask|>1"])
@pytest.mark.parametrize("begun", [False, True])
def test_a_control_token_that_a_prompt_spells_is_text(tokenizer, text, begun):
    asked = [{"role": "user", "content": "Puzzle: 1"}, {"role": "assistant", "content": text}] if begun else None
    ids = encode_prompt(tokenizer, asked or [{"role": "user", "content": text}])
    harmless = encode_prompt(tokenizer, [{"role": "user", "content": "a"}])
    assert [i for i in ids if i in tokenizer.all_special_ids and i != tokenizer.unk_token_id] == [
        i for i in harmless if i in tokenizer.all_special_ids
    ], "the template's own"
    assert text.replace("\ue000", "<|unk|>") in tokenizer.decode(ids)
    plain = tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=True, return_dict=False)
    assert tokenizer.convert_tokens_to_ids("<|eot_id|>") in plain[:-1] or tokenizer.mask_token_id in plain, "control"


def test_unknown_characters_are_marked(tokenizer):
    ids = tokenizer.encode("h\u00e9", add_special_tokens=False)
    assert ids[1] == tokenizer.unk_token_id
    assert tokenizer.decode(ids) == "h<|unk|>"


def test_special_tokens_are_lladas(tokenizer):
    assert (tokenizer.mask_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|mdm_mask|>",
        "<|endoftext|>",
        "<|endoftext|>",
    )
    assert set(tokenizer.all_special_tokens) == set(SPECIAL)
    assert tokenizer.mask_token_id != tokenizer.eos_token_id
    assert len(tokenizer) == len({*SPECIAL, *WORDS, *CHARACTERS})


def test_a_completion_decodes_to_its_text_without_the_fill(tokenizer):
    answer = "<answer>4321123434122143</answer>"
    ids = tokenizer.encode(answer, add_special_tokens=False)
    assert len(ids) == 18
    assert tokenizer.decode(ids + [tokenizer.eos_token_id] * 6, skip_special_tokens=True) == answer


def test_prompts_have_lladas_form(tokenizer):
    ids = encode_prompt(tokenizer, PUZZLE)
    header = "<|start_header_id|>{}<|end_header_id|>\n\n"
    expected = (
        "<|startoftext|>" + header.format("user") + PUZZLE[0]["content"] + "<|eot_id|>" + header.format("assistant")
    )
    assert tokenizer.decode(ids) == expected
    assert len(ids) == 27
    assert ids.count(tokenizer.bos_token_id) == 1
    two_turns = [{"role": "system", "content": " Be right. "}, *PUZZLE]
    assert "<|end_header_id|>\n\nBe right.<|eot_id|>" in tokenizer.decode(encode_prompt(tokenizer, two_turns))


def test_a_last_message_of_the_assistant_begins_the_completion() -> None:
    tokenizer = build_tokenizer()
    begun = encode_prompt(tokenizer, [*PUZZLE, {"role": "assistant", "content": "<think>3"}])
    assert begun == encode_prompt(tokenizer, PUZZLE) + tokenizer.encode("<think>3", add_special_tokens=False)
    assert "<|eot_id|>" not in tokenizer.decode(begun[-4:]) and len(begun) > len(encode_prompt(tokenizer, PUZZLE))
