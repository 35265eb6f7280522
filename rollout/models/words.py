"""Tokenizers over a list of words: amino acids, or the symbols of SMILES. No merges, no normalization.

White space in a text is left out, and decoding joins without it, so ``EVQL`` and ``E V Q L`` are the same four words.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

from tokenizers import Regex, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Sequence as InTurn
from tokenizers.pre_tokenizers import Split, WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from rewards.reactions import WORD

Kind = Literal["characters", "smiles"]
PIECES: dict[Kind, str] = {"characters": r"[\s\S]", "smiles": WORD}
"""Regular expressions whose matches are the words of a text."""


def word_tokenizer(words: Sequence[str], special: Mapping[str, str], kind: Kind) -> PreTrainedTokenizerFast:
    """The tokenizer in which ``words[i]`` has the id i.

    special: the words called ``pad_token``, ``unk_token``, ``cls_token``, ``mask_token`` and ``sep_token`` or
    ``eos_token``, all of them among the words. kind: how a text is cut into words.

    A text is written ``CLS words END``, a pair of texts ``CLS words END words END``, as BERT has them, where the end is
    the separator or else EOS. What is no word becomes ``unk_token``.
    """
    ids = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(WordLevel(ids, unk_token=special["unk_token"]))
    tokenizer.pre_tokenizer = InTurn([WhitespaceSplit(), Split(Regex(PIECES[kind]), behavior="isolated")])
    tokenizer.decoder = Fuse()
    start, end = special["cls_token"], special.get("sep_token") or special["eos_token"]
    tokenizer.post_processor = TemplateProcessing(
        single=f"{start} $A {end}",
        pair=f"{start} $A {end} $B {end}",
        special_tokens=[(start, ids[start]), (end, ids[end])],
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **special)
