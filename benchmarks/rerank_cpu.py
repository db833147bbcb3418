"""Reranking on this machine's cores beside its peers: same pairs, same weights, one run, a Markdown report.

    python benchmarks/rerank_cpu.py --report benchmarks/rerank_cpu.md

A decoder of Qwen3-Reranker-0.6B's shape with random weights against the model card's loop, which computes the logits of
the whole vocabulary at every token; an encoder of MiniLM's size against `CrossEncoder.predict`. Every run is a process of
its own; contenders take turns, and every ratio is taken inside one round.
"""

import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import click
import numpy as np

from benchmarks.corpora import mixed_lengths
from benchmarks.process import run_python
from benchmarks.reporting import machine, spread, verdict

QUERY_WORDS = 12
BARS = (  # what, the slower, the faster, least ratio
    ("decoder float32 against the card's loop", "card-float32", "decoder-float32", 2.0),
    ("encoder float32 against CrossEncoder.predict", "st-float32", "encoder-float32", 1.3),
    ("encoder bfloat16 against CrossEncoder.predict", "st-float32", "encoder-bfloat16", 2.0),
)
CONTENDERS = ("card-float32", "decoder-float32", "st-float32", "encoder-float32", "encoder-bfloat16")
MODELS = """: a decoder of Qwen3-Reranker-0.6B's
  shape with random weights, and all-MiniLM-L6-v2 under a random classifier, which gets 25 times as many queries"""


def write_pairs(path: Path, queries: int, passages: int, seed: int) -> None:
    """`queries` questions of QUERY_WORDS words, each with `passages` passages of mixed length, as JSON."""
    texts = mixed_lengths(queries * (passages + 1), seed=seed)
    asked = [" ".join(text.split()[:QUERY_WORDS]) for text in texts[:queries]]
    found = texts[queries:]
    pairs = [(asked[i // passages], passage) for i, passage in enumerate(found)]
    path.write_text(json.dumps(pairs))


def write_decoder(folder: Path) -> None:
    """Random weights in the shape of Qwen3-Reranker-0.6B. Qwen's tokenizer cannot be had here: MiniLM's, with the marks of
    the chat template, makes about as many tokens of English, in a vocabulary of Qwen's size."""
    import torch
    from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

    from benchmarks.demo import minilm

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=151_669,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=40_960,
        rope_theta=1_000_000.0,
        tie_word_embeddings=True,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(minilm())
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>", "<think>", "</think>"], special_tokens=True)
    tokenizer.model_max_length = 8192
    tokenizer.save_pretrained(folder)


def write_encoder(folder: Path) -> None:
    """MiniLM's real weights under a random classifier of one label: the shape of ms-marco-MiniLM-L6-v2."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from benchmarks.demo import minilm

    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(minilm(), num_labels=1)
    model.classifier.weight.data.normal_(std=0.5)
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(minilm())
    tokenizer.model_max_length = 512
    tokenizer.save_pretrained(folder)


def play(contender: str, pairs: Path, model: Path, output: Path) -> None:
    """Score all pairs as one contender; write the scores and the seconds, loading left out."""
    queries, passages = zip(*json.loads(pairs.read_text()), strict=True)
    kind, dtype = contender.split("-")
    score = {"card": _card, "st": _sentence_transformers}.get(kind, _shoal)(model, dtype, kind)
    began = time.perf_counter()
    scores = score(queries, passages)
    seconds = time.perf_counter() - began
    output.write_text(json.dumps({"seconds": seconds, "scores": np.asarray(scores, dtype=float).tolist()}))


Score = Callable[[Sequence[str], Sequence[str]], np.ndarray]


def _card(model: Path, dtype: str, _: str) -> Score:
    """The loop of Qwen3-Reranker's card: batches of 8 in arrival order, left padding, logits of every token."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from lib import recipes

    recipe = recipes.load("qwen3-reranker")
    before, pair, after = (segment.replace("{instruction}", recipe.instruction) for segment in recipe.segments)
    tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
    network = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)).eval()
    head, tail = (tokenizer.encode(text, add_special_tokens=False) for text in (before, after))
    yes, no = tokenizer.convert_tokens_to_ids(["yes", "no"])

    @torch.inference_mode()
    def score(queries: Sequence[str], passages: Sequence[str]) -> np.ndarray:
        found: list[float] = []
        for start in range(0, len(queries), 8):
            texts = [
                pair.replace("{query}", query).replace("{passage}", passage)
                for query, passage in zip(queries[start : start + 8], passages[start : start + 8], strict=True)
            ]
            room = 8192 - len(head) - len(tail)
            ids = tokenizer(texts, padding=False, truncation=True, max_length=room, add_special_tokens=False)[
                "input_ids"
            ]
            batch = tokenizer.pad({"input_ids": [head + each + tail for each in ids]}, return_tensors="pt")
            logits = network(**batch).logits[:, -1, :]
            both = torch.stack([logits[:, no], logits[:, yes]], dim=1).float()
            found += torch.nn.functional.log_softmax(both, dim=1)[:, 1].exp().tolist()
        return np.array(found)

    return score


def _sentence_transformers(model: Path, dtype: str, _: str) -> Score:
    from sentence_transformers import CrossEncoder

    encoder = CrossEncoder(str(model), device="cpu")
    return lambda queries, passages: encoder.predict(list(zip(queries, passages, strict=True)))


def _shoal(model: Path, dtype: str, kind: str) -> Score:
    from lib.models.reranker import Reranker
    from lib.models.reranker_options import RerankerOptions, resolve_reranker

    spec = resolve_reranker(RerankerOptions(model=str(model), recipe="qwen3-reranker" if kind == "decoder" else None))
    format_pairs, reranker = spec.pair_format(), Reranker(spec, dtype=dtype, device="cpu")

    def score(queries: Sequence[str], passages: Sequence[str]) -> np.ndarray:
        groups = np.unique(np.array(queries), return_inverse=True)[1]
        return reranker.score(format_pairs(queries, passages), groups)

    return score


def run(contender: str, pairs: Path, model: Path, output: Path) -> tuple[float, np.ndarray]:
    run_python(contender, ["-m", "benchmarks.rerank_cpu", "--play", contender, str(pairs), str(model), str(output)])
    told = json.loads(output.read_text())
    click.echo(f"  {contender:<18} {told['seconds']:7.1f} s", err=True)
    return told["seconds"], np.array(told["scores"])


def report(seconds: dict[str, list[float]], scores: dict[str, np.ndarray], head: list[str], line: str) -> str:
    said = [f"# Reranking on {head[1].split(',')[0].removeprefix('- ')}", "", f"- {line}", *head, ""]
    said += ["| contender | seconds | scores off by at most |", "|---|---|---|"]
    for name, values in seconds.items():
        peer = "card-float32" if name.startswith(("card", "decoder")) else "st-float32"
        said.append(f"| {name} | {spread(values, '{:.1f}')} | {np.abs(scores[name] - scores[peer]).max():.1e} |")
    said += ["", "| bar | asked | median (least - most) | |", "|---|---|---|---|"]
    for what, slower, faster, least in BARS:
        found = [a / b for a, b in zip(seconds[slower], seconds[faster], strict=True)]
        said.append(f"| {what} | >= {least} | {spread(found)} | {verdict(median(found) >= least)} |")
    return "\n".join(said) + "\n"


@click.command()
@click.option(
    "--queries", default=1, show_default=True, help="Queries of the decoder; the encoder gets 25 times as many."
)
@click.option("--passages", default=20, show_default=True, help="Passages a query.")
@click.option("--rounds", default=5, show_default=True, help="Runs of every contender.")
@click.option("--report", "path", type=click.Path(dir_okay=False), help="Also write the report here.")
@click.option("--play", "part", nargs=4, hidden=True)
def main(queries: int, passages: int, rounds: int, path: str | None, part: tuple[str, str, str, str] | None) -> None:
    """Run every contender and print the report."""
    if part:
        return play(part[0], *map(Path, part[1:]))
    load = os.getloadavg()
    seconds: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    scores: dict[str, np.ndarray] = {}
    with tempfile.TemporaryDirectory(prefix="shoal-rerank-") as name:
        folder = Path(name)
        inputs = {"decoder": folder / "few.json", "encoder": folder / "many.json"}
        write_pairs(inputs["decoder"], queries, passages, seed=1)
        write_pairs(inputs["encoder"], queries * 25, passages, seed=2)
        write_decoder(folder / "decoder")
        write_encoder(folder / "encoder")
        for number in range(rounds):
            click.echo(f"round {number + 1} of {rounds}", err=True)
            for contender in CONTENDERS:
                kind = "decoder" if contender.startswith(("card", "decoder")) else "encoder"
                took, scores[contender] = run(contender, inputs[kind], folder / kind, folder / "out.json")
                seconds[contender].append(took)
    line = f"`python benchmarks/rerank_cpu.py --queries {queries} --passages {passages} --rounds {rounds}`{MODELS}"
    text = report(seconds, scores, machine(load), line)
    click.echo(text)
    if path:
        Path(path).write_text(text)


if __name__ == "__main__":
    main()
