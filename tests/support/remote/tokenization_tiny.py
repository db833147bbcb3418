"""A tokenizer as a checkpoint would bring it, written for the tests: tiktoken's ranks in a file, slow, its own class."""

import os
from typing import ClassVar

import tiktoken
from tiktoken.load import load_tiktoken_bpe
from transformers import PreTrainedTokenizer

PATTERN = r"""\p{L}{1,5}|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+"""  # of no known model
SPECIAL = ("<pad>", "<unk>", "<eod>", "<|im_start|>", "<|im_end|>")
FILE = "tiny.tiktoken"


class TinyTokenizer(PreTrainedTokenizer):
    vocab_files_names: ClassVar = {"vocab_file": FILE}
    model_input_names: ClassVar = ["input_ids", "attention_mask"]

    def __init__(self, vocab_file, **options):
        ranks = load_tiktoken_bpe(vocab_file)
        special = {name: len(ranks) + number for number, name in enumerate(SPECIAL)}
        self.encoding = tiktoken.Encoding("tiny", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=special)
        self.names = {number: name for name, number in special.items()}
        self.vocab_file = vocab_file
        options |= {"eos_token": "<eod>", "pad_token": "<pad>", "unk_token": "<unk>"}
        super().__init__(**options)

    @property
    def vocab_size(self):
        return self.encoding.n_vocab

    def get_vocab(self):
        ranks = {token.decode("latin-1"): rank for token, rank in self.encoding._mergeable_ranks.items()}
        return ranks | self.encoding._special_tokens

    def _tokenize(self, text, **_):
        return [str(number) for number in self.encoding.encode(text, allowed_special="all")]

    def _convert_token_to_id(self, token):
        return self.encoding._special_tokens[token] if token in self.encoding._special_tokens else int(token)

    def _convert_id_to_token(self, index):
        return self.names.get(index, str(index))

    def convert_tokens_to_string(self, tokens):
        return self.encoding.decode([int(token) for token in tokens])

    def save_vocabulary(self, save_directory, filename_prefix=None):
        return (os.path.join(save_directory, FILE),)
