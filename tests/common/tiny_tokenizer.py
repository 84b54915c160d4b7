# SPDX-License-Identifier: BSD-3-Clause
"""A tokenizer for trainers that want one: the words "0", "1", ... are tokens 0, 1, ..."""

from tiny_models import PAD, VOCABULARY
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast


def tiny_tokenizer():
    words = Tokenizer(WordLevel({str(i): i for i in range(VOCABULARY)}, unk_token=str(PAD)))
    words.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token=str(PAD), eos_token="2")
