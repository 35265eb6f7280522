"""The small models' tokenizer: printable ASCII a character at a time, a few tags and labels as one token each.

Special tokens, role headers and chat template have the form of LLaDA's, so code that works with this tokenizer works
with the published one. The tags ``<answer>``, ``</answer>``, ``<think>``, ``</think>`` are ordinary tokens: they are
part of the text and survive ``decode(..., skip_special_tokens=True)``. Decoding joins without spaces, so text made of
known characters comes back as it was.
"""

import string

from tokenizers import Regex, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedTokenizerFast

START = "<|startoftext|>"
EOS = "<|endoftext|>"  # the pad as well
MASK = "<|mdm_mask|>"
UNKNOWN = "<|unk|>"
SPECIAL = (EOS, MASK, START, "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", UNKNOWN)
WORDS = (
    *("<think>", "</think>", "<answer>", "</answer>"),
    *("system", "assistant", "user"),
    *("Puzzle: ", "Numbers: ", " Target: ", "\n\n"),
)
CHARACTERS = ("\n", " ", *string.digits, *string.ascii_letters, *string.punctuation)

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n{{ message['content'] | trim }}<|eot_id|>"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A new tokenizer, the same each time. Characters outside printable ASCII and newline become ``<|unk|>``."""
    vocabulary = {token: index for index, token in enumerate((*SPECIAL, *WORDS, *CHARACTERS))}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token=UNKNOWN))
    # Each match is a piece of its own: a word where one starts here, else one character of whatever kind.
    pieces = Regex("|".join((*map(_literal, WORDS), r"[\s\S]")))
    tokenizer.pre_tokenizer = Split(pieces, behavior="isolated")
    tokenizer.decoder = Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=START,
        eos_token=EOS,
        pad_token=EOS,
        mask_token=MASK,
        unk_token=UNKNOWN,
        extra_special_tokens=[token for token in SPECIAL if token not in (START, EOS, MASK, UNKNOWN)],
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def _literal(text: str) -> str:
    """The text with the tokenizer's regex metacharacters escaped (Python's ``re.escape`` escapes spaces as well, which
    this dialect reads differently)."""
    return "".join(f"\\{character}" if character in r"\.^$*+?()[]{}|/" else character for character in text)
