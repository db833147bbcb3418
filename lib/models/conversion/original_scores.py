"""Scores by the code that a checkpoint brings. Run as a program in an environment of its own, never imported:

    python original_scores.py zhinao MODEL PAIRS.json FOUND.json
    python original_scores.py minicpm MODEL PAIRS.json FOUND.json LAYER

FOUND has the scores, the token ids of each pair, and, where the brought tokenizer is one of tiktoken's, what makes it.
The brought code is executed: use an interpreter that may. It needs torch and the transformers version that the code was
written for (4.34 for 360Zhinao), and nothing of Shoal. In float32, one pair at a time, so that padding plays no part but
where the original pads: 360Zhinao's to 1024 tokens.
"""

import base64
import json
import sys
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

IGNORED = -100
LENGTH, ANSWER = 1024, 64  # tokens of a 360Zhinao sequence, and those that are kept for the template
QUESTION = (
    "Given a query A and a passage B, determine whether the passage contains an answer to the query by providing a "
    "prediction of either 'Yes' or 'No'."
)


def zhinao(model: Any, tokenizer: Any, query: str, passage: str) -> "tuple[torch.Tensor, list[int]]":
    """As 360's flag_models.preprocess lays a pair out, labels and all."""

    def ids(text: str) -> list[int]:
        return tokenizer(text, max_length=LENGTH - ANSWER, truncation=True)["input_ids"]

    line = ids("\n")
    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    found: list[int] = []
    labels: list[int] = []
    for role, text in (("system", ""), ("<|im_start|>user", f"{query}\n\n{passage}"), ("<|im_start|>assistant", "0")):
        opened = [start, *ids(role)] if role == "system" else ids(role)
        turn = [*opened, *line, *ids(text), end, *line]
        inner = [IGNORED] * (len(turn) - 3)
        if role.endswith("assistant"):
            inner = [IGNORED] * len(opened) + turn[len(opened) + 1 : -2]
        found += turn
        labels += [start, *inner, end, *line]
    padding = LENGTH - len(found)
    batch = torch.tensor([found + [tokenizer.eos_token_id] * padding])
    known = torch.tensor([labels + [IGNORED] * padding])
    seen = batch.ne(tokenizer.eos_token_id)
    return model(input_ids=batch, labels=known, attention_mask=seen).logits.flatten()[0], found


def minicpm(model: Any, tokenizer: Any, query: str, passage: str, layer: str) -> "tuple[torch.Tensor, list[int]]":
    """As FlagEmbedding's layerwise reranker lays a pair out."""

    def ids(text: str, most: int) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"][:most]

    separator, prompt = ids("\n", 99), ids(QUESTION, 999)
    first = [tokenizer.bos_token_id, *ids(f"A: {query}", LENGTH * 3 // 4)]
    room = LENGTH + len(separator) + len(prompt) - len(first)
    second = [*separator, *ids(f"B: {passage}", LENGTH)][:room]
    found = [*first, *second, *separator, *prompt]
    batch = torch.tensor([found])
    logits = model(input_ids=batch, attention_mask=torch.ones_like(batch), cutoff_layers=[int(layer)]).logits
    return logits[0].reshape(len(found), -1)[-1, 0], found


def tiktoken_of(tokenizer: Any) -> dict | None:
    """Pattern, ranks and special tokens of the tiktoken encoding inside a tokenizer; None where there is none."""
    inside = [value for value in vars(tokenizer).values() if hasattr(value, "_mergeable_ranks")]
    if not inside:
        return None
    ranks = {base64.b64encode(token).decode(): rank for token, rank in inside[0]._mergeable_ranks.items()}
    names = {name: str(getattr(tokenizer, name)) for name in ("eos_token", "pad_token", "unk_token")}
    return {"pattern": inside[0]._pat_str, "special": inside[0]._special_tokens, "ranks": ranks, "names": names}


@torch.no_grad()
def main(kind: str, folder: str, pairs: str, output: str, *more: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True, use_fast=kind != "zhinao")
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).float().eval()
    score: Any = {"zhinao": zhinao, "minicpm": minicpm}[kind]
    with open(pairs) as file:
        found = [score(model, tokenizer, query, passage, *more) for query, passage in json.load(file)]
    made = {"scores": [float(each) for each, _ in found], "ids": [ids for _, ids in found]}
    with open(output, "w") as file:
        json.dump({**made, "tiktoken": tiktoken_of(tokenizer)}, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
