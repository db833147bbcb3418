"""Tokenizers of tiny models, trained on a few sentences: WordPiece, unigram and byte-level BPE."""

from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

TEXT = [
    "A shoal is a group of fish that swim together for safety, and none of them leads the others.",
    "The quick brown fox jumps over 13 lazy dogs; it's 9:45 and they won't move an inch.",
    "Token budgets, not batch sizes: documents of one length lie together, so nothing is padded.",
    "查询和文档分别编码，向量相似度决定排序。为这个句子生成表示以用于检索相关文章。",
    "Ein Satz mit Umlauten: Größe, Übung, naïve café, señor, smörgåsbord.",
    "def encode(texts): return [model(t) for t in texts]  # code, too",
]
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def word_piece() -> PreTrainedTokenizerFast:
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    normalizer, splitter = normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()
    words = {word for text in TEXT for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text))}
    pieces = sorted({piece for number, word in enumerate(sorted(words)) for piece in _pieces(word, number)})
    vocabulary = {piece: number for number, piece in enumerate([*specials, *pieces])}
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.normalizer, backend.pre_tokenizer = normalizer, splitter
    _template(backend, "[CLS]", "[SEP]")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )


def _pieces(word: str, number: int) -> list[str]:
    """Pieces of a word: its letters, and the word, every other word in two pieces. A trained vocabulary would vary by process."""
    letters = [*word, *(f"##{letter}" for letter in word)]
    return [*letters, word] if number % 2 else [*letters, word[:3], f"##{word[3:]}" if word[3:] else word]


def unigram() -> PreTrainedTokenizerFast:
    specials = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    backend = Tokenizer(models.Unigram())
    backend.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(_regex(" {2,}"), " ")])
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    backend.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=300, special_tokens=specials, unk_token="<unk>")
    backend.train_from_iterator(TEXT, trainer)
    _template(backend, "<s>", "</s>")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        mask_token="<mask>",
    )


def byte_level() -> PreTrainedTokenizerFast:
    specials = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=specials, initial_alphabet=alphabet)
    backend.train_from_iterator(TEXT, trainer)
    backend.add_special_tokens([AddedToken("<mask>", lstrip=True, special=True)])
    backend.post_processor = processors.RobertaProcessing(
        ("</s>", backend.token_to_id("</s>")), ("<s>", backend.token_to_id("<s>")), add_prefix_space=False
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        mask_token="<mask>",
    )


def qwen() -> PreTrainedTokenizerFast:
    """Byte-level BPE with Qwen's splitting and neither a beginning nor an end token, as published for gte-Qwen2."""
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(_regex(QWEN_SPLIT), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|endoftext|>", "<|im_start|>"], initial_alphabet=alphabet
    )
    backend.train_from_iterator(TEXT, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<|endoftext|>", eos_token="<|endoftext|>")


def _regex(pattern: str) -> Any:
    from tokenizers import Regex

    return Regex(pattern)


def _template(backend: Tokenizer, head: str, tail: str) -> None:
    """Add special tokens: pairs in BERT's format where the tail is [SEP], else in RoBERTa's."""
    pairs = [(token, backend.token_to_id(token)) for token in (head, tail)]
    joined = f"{head} $A {tail} $B:1 {tail}:1" if tail == "[SEP]" else f"{head} $A {tail} {tail} $B {tail}"
    backend.post_processor = processors.TemplateProcessing(
        single=f"{head} $A {tail}", pair=joined, special_tokens=pairs
    )


def qwen_chat() -> PreTrainedTokenizerFast:
    """Qwen's tokenizer with the special tokens of its chat template, and `yes` and `no` as tokens."""
    tokenizer = qwen()
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>", "<think>", "</think>"], special_tokens=True)
    tokenizer.add_tokens(["yes", "no"])
    return tokenizer


def gemma() -> PreTrainedTokenizerFast:
    """A unigram tokenizer that puts <bos> before every text, with `Yes` as a token."""
    tokenizer = qwen()
    tokenizer.add_special_tokens({"bos_token": "<bos>"})
    tokenizer.add_tokens(["Yes", "No"])
    backend = tokenizer.backend_tokenizer
    backend.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", backend.token_to_id("<bos>"))]
    )
    return tokenizer
