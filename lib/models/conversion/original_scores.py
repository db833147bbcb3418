"""Score pairs by a checkpoint's own model code. This is a program for an environment of its own, never imported:

    python original_scores.py zhinao MODEL PAIRS.json SCORES.json
    python original_scores.py minicpm MODEL PAIRS.json SCORES.json LAYER

SCORES has the scores, the token ids of each pair, and the content of the tokenizer where it is one of tiktoken's. The
checkpoint's code is executed, so run it only with an interpreter that may. It needs torch and the transformers version of
the code (4.34 for 360Zhinao), and nothing of Shoal. It runs in float32, one pair at a time, so there is no padding except
where the original pads: 360Zhinao's to 1024 tokens.
"""

import base64
import json
import sys
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

IGNORED_LABEL = -100  # the label of tokens without a loss
LENGTH, TEMPLATE_TOKENS = 1024, 64  # tokens of a 360Zhinao sequence, and tokens reserved for its template
QUESTION = (
    "Given a query A and a passage B, determine whether the passage contains an answer to the query by providing a "
    "prediction of either 'Yes' or 'No'."
)


def zhinao(model: Any, tokenizer: Any, query: str, passage: str) -> "tuple[torch.Tensor, list[int]]":
    """Score a pair laid out as 360's flag_models.preprocess does, with its labels; return its token ids too."""

    def ids(text: str) -> list[int]:
        return tokenizer(text, max_length=LENGTH - TEMPLATE_TOKENS, truncation=True)["input_ids"]

    line = ids("\n")
    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    token_ids: list[int] = []
    labels: list[int] = []
    for role, text in (("system", ""), ("<|im_start|>user", f"{query}\n\n{passage}"), ("<|im_start|>assistant", "0")):
        opening = [start, *ids(role)] if role == "system" else ids(role)
        message = [*opening, *line, *ids(text), end, *line]
        inner = [IGNORED_LABEL] * (len(message) - 3)
        if role.endswith("assistant"):
            inner = [IGNORED_LABEL] * len(opening) + message[len(opening) + 1 : -2]
        token_ids += message
        labels += [start, *inner, end, *line]
    padding = LENGTH - len(token_ids)
    batch = torch.tensor([token_ids + [tokenizer.eos_token_id] * padding])
    label_batch = torch.tensor([labels + [IGNORED_LABEL] * padding])
    attended = batch.ne(tokenizer.eos_token_id)
    return model(input_ids=batch, labels=label_batch, attention_mask=attended).logits.flatten()[0], token_ids


def minicpm(model: Any, tokenizer: Any, query: str, passage: str, layer: str) -> "tuple[torch.Tensor, list[int]]":
    """Score a pair laid out as FlagEmbedding's layerwise reranker does; return its token ids too."""

    def ids(text: str, limit: int) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"][:limit]

    separator, prompt = ids("\n", 99), ids(QUESTION, 999)
    first = [tokenizer.bos_token_id, *ids(f"A: {query}", LENGTH * 3 // 4)]
    room = LENGTH + len(separator) + len(prompt) - len(first)
    second = [*separator, *ids(f"B: {passage}", LENGTH)][:room]
    token_ids = [*first, *second, *separator, *prompt]
    batch = torch.tensor([token_ids])
    logits = model(input_ids=batch, attention_mask=torch.ones_like(batch), cutoff_layers=[int(layer)]).logits
    return logits[0].reshape(len(token_ids), -1)[-1, 0], token_ids


def tiktoken_of(tokenizer: Any) -> dict | None:
    """Return pattern, ranks and special tokens of the tiktoken encoding inside a tokenizer, or None without one."""
    encodings = [value for value in vars(tokenizer).values() if hasattr(value, "_mergeable_ranks")]
    if not encodings:
        return None
    ranks = {base64.b64encode(token).decode(): rank for token, rank in encodings[0]._mergeable_ranks.items()}
    names = {name: str(getattr(tokenizer, name)) for name in ("eos_token", "pad_token", "unk_token")}
    return {"pattern": encodings[0]._pat_str, "special": encodings[0]._special_tokens, "ranks": ranks, "names": names}


@torch.no_grad()
def main(kind: str, folder: str, pairs: str, output_path: str, *layer: str) -> None:
    """Score the pairs of a JSON file with the model in `folder`, and write scores, token ids and tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True, use_fast=kind != "zhinao")
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).float().eval()
    score: Any = {"zhinao": zhinao, "minicpm": minicpm}[kind]
    with open(pairs) as file:
        results = [score(model, tokenizer, query, passage, *layer) for query, passage in json.load(file)]
    output_scores = {"scores": [float(each) for each, _ in results], "ids": [ids for _, ids in results]}
    with open(output_path, "w") as file:
        json.dump({**output_scores, "tiktoken": tiktoken_of(tokenizer)}, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
