"""The inputs of same_bits.py: texts, vectors and random models from fixed seeds, equal to the byte in every process."""

import json
import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

WORDS = [
    "a",
    "shoal",
    "of",
    "fish",
    "swims",
    "together",
    "and",
    "none",
    "leads",
    "the",
    "others",
    "quick",
    "foxes",
    "查询",
    "文档",
    "向量",
]
VOCABULARY = [*WORDS, *(f"w{number}" for number in range(150))]
SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
DOCUMENTS, DIM = 600, 32
WRITTEN = 1_700_000_000  # time of every input file, seconds since 1970: seeds of samples depend on it


def make_inputs(work: Path) -> None:
    """Write all texts, vectors and models below `work`."""
    rng = random.Random(5)
    texts = [_text(rng, 3, 90) for _ in range(DOCUMENTS)]
    texts[17], texts[40], texts[DOCUMENTS - 1] = "", texts[41], " "
    ids = [f"p{number}" for number in range(DOCUMENTS)]
    for number in range(2):
        rows = slice(number * 300, number * 300 + 300)
        _parquet(work / f"docs/{number}.parquet", {"id": ids[rows], "text": texts[rows], "n": list(range(300))})
    _jsonl(work / "lines/docs.jsonl", [{"title": ids[i], "text": text} for i, text in enumerate(texts)])
    queries = [" ".join(text.split()[:5]) or "fish" for text in texts[:40]]
    _jsonl(work / "queries.jsonl", [{"id": f"q{i}", "text": text} for i, text in enumerate(queries)])
    _candidates(work, queries, texts, ids)
    _beir(work / "beir", queries, texts, ids)
    _training_rows(work / "pairs.jsonl", rng)
    _vectors(work)
    _models(work / "models")
    for file in work.rglob("*"):
        if "out" not in file.relative_to(work).parts:
            os.utime(file, (WRITTEN, WRITTEN))


def _text(rng: random.Random, least: int, most: int) -> str:
    return " ".join(rng.choices(VOCABULARY, k=rng.randint(least, most)))


def _candidates(work: Path, queries: list[str], texts: list[str], ids: list[str]) -> None:
    """12 passages a query, the pairs of one query far apart; the same pairs as texts. One passage is unknown."""
    chosen = [(query, (query * 7 + 31 * turn) % DOCUMENTS) for turn in range(12) for query in range(len(queries))]
    asked, found = [queries[query] for query, _ in chosen], [texts[passage] for _, passage in chosen]
    _parquet(work / "pairs/0.parquet", {"id": list(range(len(chosen))), "query": asked, "passage": found})
    passages = [ids[passage] for _, passage in chosen[:-1]] + ["unknown"]
    names = {"query_id": [f"q{query}" for query, _ in chosen], "passage_id": passages}
    _parquet(work / "candidates/0.parquet", names)


def _beir(folder: Path, queries: list[str], texts: list[str], ids: list[str]) -> None:
    _jsonl(folder / "corpus.jsonl", [{"_id": each, "text": text} for each, text in zip(ids, texts, strict=True)])
    _jsonl(folder / "queries.jsonl", [{"_id": f"q{number}", "text": text} for number, text in enumerate(queries)])
    judged = [f"q{q}\tp{(q + 97 * turn) % DOCUMENTS}\t{2 - turn % 3}" for q in range(len(queries)) for turn in range(5)]
    (folder / "qrels").mkdir(exist_ok=True)
    (folder / "qrels/test.tsv").write_text("\n".join(["query-id\tcorpus-id\tscore", *judged]) + "\n")


def _training_rows(file: Path, rng: random.Random) -> None:
    positives = [_text(rng, 4, 30) for _ in range(200)]
    rows = [
        {
            "query": " ".join(text.split()[:4]) + f" w{i % 150}",
            "pos": [text],
            "neg": [_text(rng, 4, 30) for _ in range(3)],
        }
        for i, text in enumerate(positives)
    ]
    _jsonl(file, rows)


def _vectors(work: Path) -> None:
    """3,000 vectors around 60 centres in three files, and 50 queries."""
    rng = np.random.default_rng(11)
    centres = rng.standard_normal((60, DIM))
    made = centres[rng.integers(0, 60, 3050)] + 0.5 * rng.standard_normal((3050, DIM))
    made = (made / np.linalg.norm(made, axis=1, keepdims=True)).astype(np.float32)
    for number, rows in enumerate(np.array_split(np.arange(3050), [1000, 2000, 3000])):
        column = pa.FixedSizeListArray.from_arrays(pa.array(made[rows].reshape(-1)), DIM)
        file = work / ("vector_queries.parquet" if number == 3 else f"vectors/{number}.parquet")
        _parquet(file, {"id": [f"v{row}" for row in rows], "embedding": column})


def _models(folder: Path) -> None:
    import transformers as hf

    words, bytes_ = _word_tokenizer(), _byte_tokenizer()
    encoder = SHAPE | {"vocab_size": len(words), "pad_token_id": 1, "max_position_embeddings": 130}
    decoder = SHAPE | {"vocab_size": len(bytes_), "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0}
    ranker = hf.BertConfig(**encoder | {"max_position_embeddings": 512, "num_labels": 1})
    language = hf.Qwen3Config(**decoder, max_position_embeddings=2048, tie_word_embeddings=True)
    _save(folder / "embedder", hf.BertModel, hf.BertConfig(**encoder), words, "mean")
    _save(folder / "m3", hf.XLMRobertaModel, hf.XLMRobertaConfig(**encoder), words, "cls")
    _save(folder / "reranker", hf.BertForSequenceClassification, ranker, words)
    _save(folder / "qwen", hf.Qwen3ForCausalLM, language, bytes_)
    _m3_layers(folder / "m3")


def _save(folder: Path, network: Any, config: Any, tokenizer: Any, pooling: str | None = None) -> None:
    """A model directory with weights large enough for a wrong mask or position to show."""
    import torch

    torch.manual_seed(7)
    model = network(config)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(std=0.2)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if pooling:
        stages = (("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize"))
        modules = [
            {"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for number, (path, kind) in enumerate(stages)
        ]
        _json(folder / "modules.json", modules)
        _json(folder / "1_Pooling/config.json", {"embedding_dimension": DIM, "pooling_mode": pooling})
        _json(folder / "sentence_bert_config.json", {"max_seq_length": 64})
        (folder / "2_Normalize").mkdir(exist_ok=True)


def _m3_layers(folder: Path) -> None:
    import torch

    torch.manual_seed(3)
    for name, width in (("sparse_linear.pt", 1), ("colbert_linear.pt", DIM)):
        torch.save(torch.nn.Linear(DIM, width).state_dict(), folder / name)


def _word_tokenizer() -> Any:
    """Whole words between <s> and </s>. A tokenizer that is trained would differ in each process."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["<s>", "<pad>", "</s>", "<unk>", *VOCABULARY]
    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    specials = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    more = {"cls_token": "<s>", "sep_token": "</s>", "model_max_length": 512}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **specials, **more)


def _byte_tokenizer() -> Any:
    """A token a byte, and what the template of Qwen3-Reranker needs."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = ["<|endoftext|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token=tokens[0], eos_token=tokens[0])
    made.add_tokens(["<|im_start|>", "<|im_end|>", "<think>", "</think>"], special_tokens=True)
    made.add_tokens(["yes", "no"])
    made.model_max_length = 2048
    return made


def _parquet(file: Path, columns: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), file)


def _jsonl(file: Path, rows: Sequence[dict[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _json(file: Path, content: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))
