"""The encoder on one CUDA device against what the device can do, and beside sentence-transformers.

    python benchmarks/embed_gpu.py --report benchmarks/embed_gpu.md

all-MiniLM-L6-v2 has its real weights; the other networks are built on the spot at their published shapes with random
weights, which are as fast. Texts are words of one token each, so both sides see exactly the lengths that are asked.
"""

import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
import transformers

from benchmarks.demo import minilm
from benchmarks.exact_lengths import Corpus, corpora
from benchmarks.networks import SHAPES, build
from benchmarks.reporting import cosines
from lib.models.encoder import Encoder
from lib.models.spec import ModelSpec, Tokens, flops_per_token
from lib.models.spec_reader import read_spec

LIBRARIES = ("torch", "transformers", "sentence-transformers", "tokenizers", "numpy")
BATCHES = (32, 128, 512)  # of sentence-transformers
CHECKED = 96  # texts
LEAST_COSINE, LEAST_COSINE_16_BITS = 0.99999, 0.999
WARM_TEXTS = 512
FORWARDS = 32  # batches of sentence-transformers, tokenised in advance


@dataclass(frozen=True)
class Size:
    """How much is measured: for real on CUDA, or tiny, to try the same code on a CPU."""

    budgets: tuple[int, ...] = (8192, 16384, 32768, 65536, 131072)
    tokens: int = 8_000_000  # of a corpus, at most
    seconds: float = 1.0  # a measurement lasts at least, unless it reaches the end of the corpus
    long: int = 512
    matmul: int = 8192
    minutes: float = 7.0  # after which no further measurement begins


SMALL = Size(budgets=(256, 1024), tokens=2000, seconds=0.05, long=64, matmul=256)


Rate = tuple[str, float, float]  # what, tokens a second, the most GiB


# --- measuring ------------------------------------------------------------------------------------------------------


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(run: Callable[[], Any], device: torch.device) -> float:
    wait(device)
    began = time.perf_counter()
    run()
    wait(device)
    return time.perf_counter() - began


def matmul_rate(rows: int, inner: int, columns: int, device: torch.device) -> float:
    """FLOP/s of a bf16 product [rows, inner] x [inner, columns]: the best of five series."""
    left = torch.randn(rows, inner, device=device, dtype=torch.bfloat16)
    right = torch.randn(inner, columns, device=device, dtype=torch.bfloat16)
    repeat = max(1, int(4e12 / (2 * rows * inner * columns))) if device.type == "cuda" else 1

    def multiply() -> None:
        for _ in range(repeat):
            left @ right

    return 2 * rows * inner * columns * repeat / min([seconds_of(multiply, device) for _ in range(6)][1:])


def token_rate(run: Callable[[Corpus], Any], corpus: Corpus, size: Size, device: torch.device) -> float:
    """Tokens a second of `run`, over as many texts of the corpus as it takes to last `size.seconds`."""
    count = min(WARM_TEXTS, len(corpus.texts))
    run(corpus.head(count))  # kernels are chosen and memory is taken at the first call
    while True:
        part = corpus.head(count)
        seconds = seconds_of(partial(run, part), device)
        if seconds >= size.seconds or count == len(corpus.texts):
            return len(part.tokens.ids) / seconds
        count = min(len(corpus.texts), max(2 * count, int(1.2 * count * size.seconds / seconds)))


@contextmanager
def peak_memory(device: torch.device) -> Iterator[list[float]]:
    """The most GiB allocated inside the block, in the list that is yielded; 0 without CUDA."""
    most = [0.0]
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    yield most
    if device.type == "cuda":
        most[0] = torch.cuda.max_memory_allocated(device) / 2**30


# --- the report -----------------------------------------------------------------------------------------------------


def agreement(path: Path, corpus: Corpus, device: torch.device) -> Iterator[str]:
    """Every way to encode a few texts, held against transformers' float32 for each text alone."""
    few = corpus.head(min(CHECKED, len(corpus.texts)))
    alone = [Tokens(ids, np.array([0, len(ids)]), few.tokens.truncated[:1]) for ids in np.split(*few.tokens[:2])[1:-1]]
    reference = peer(path, torch.float32, device).encode(few.texts, batch_size=1)
    yield "| vectors | against | least cosine | mean | nearest is its own | |"
    yield "|---|---|---|---|---|---|"
    stock = "transformers float32, each alone"
    for dtype, least in (("float32", LEAST_COSINE), (half(device), LEAST_COSINE_16_BITS)):
        encoder = Encoder(read_spec(str(path)), dtype=dtype, device=str(device))
        packed = encoder.encode(few.tokens)
        apart = np.concatenate([encoder.encode(one) for one in alone])
        yield agreement_line(f"{dtype}, {encoder.mode}", f"{dtype}, each alone", packed, apart, least)
        yield agreement_line(f"{dtype}, {encoder.mode}", stock, packed, reference, least)
    theirs = peer(path, peer_half(device), device).encode(few.texts).astype(np.float32)
    yield agreement_line("sentence-transformers 16 bits, batch 32", stock, theirs, reference, LEAST_COSINE_16_BITS)


def agreement_line(what: str, other: str, found: np.ndarray, expected: np.ndarray, least: float) -> str:
    cosine = cosines(found, expected)
    unit = [rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (found, expected)]
    own = np.mean((unit[0] @ unit[1].T).argmax(axis=1) == np.arange(len(found)))
    verdict = "ok" if cosine.min() >= least else f"FAILED: under {least}"
    return f"| {what} | {other} | {cosine.min():.6f} | {cosine.mean():.6f} | {own:.0%} | {verdict} |"


def half(device: torch.device) -> str:
    return "bfloat16" if device.type == "cpu" or torch.cuda.is_bf16_supported() else "float16"


def peer_half(device: torch.device) -> torch.dtype:
    """float16, the usual choice on GPUs; CPUs have no arithmetic for it."""
    return torch.bfloat16 if device.type == "cpu" else torch.float16


def peer(path: Path, dtype: torch.dtype, device: torch.device) -> Any:
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(path), device=str(device), model_kwargs={"dtype": dtype})


def speed(path: Path, corpus: Corpus, size: Size, peak: float, device: torch.device) -> Iterator[str]:
    """A line for each batch size of sentence-transformers, then for each token budget."""
    spec = read_spec(str(path))
    costs = [flops_per_token(spec, int(length)) for length in corpus.lengths]
    flops = float(np.average(costs, weights=corpus.lengths))
    yield "| | tokens/s | TFLOP/s | of the matmul peak | x sentence-transformers, batch 32 | GiB |"
    yield "|---|---|---|---|---|---|"
    base = 0.0
    for label, rate, memory in (*peer_rates(path, corpus, size, device), *encoder_rates(spec, corpus, size, device)):
        base = base or rate
        share = rate * flops / peak
        yield f"| {label} | {rate:,.0f} | {rate * flops / 1e12:.2f} | {share:.0%} | {rate / base:.2f} | {memory:.1f} |"


def peer_rates(path: Path, corpus: Corpus, size: Size, device: torch.device) -> Iterator[Rate]:
    model = peer(path, peer_half(device), device)
    for batch in BATCHES:
        label = f"sentence-transformers {str(peer_half(device)).removeprefix('torch.')}, batch {batch}"
        with peak_memory(device) as most:
            called = token_rate(lambda part, n=batch: model.encode(part.texts, batch_size=n), corpus, size, device)
        yield f"{label}, `encode`", called, most[0]
        with peak_memory(device) as most:
            forward = forward_rate(model, corpus, batch, device)
        yield f"{label}, tokenised in advance", forward, most[0]


def encoder_rates(spec: ModelSpec, corpus: Corpus, size: Size, device: torch.device) -> Iterator[Rate]:
    encoder = Encoder(spec, dtype=half(device), device=str(device))
    for budget in size.budgets:
        encoder.token_budget = budget
        with peak_memory(device) as most:
            rate = token_rate(lambda part: encoder.encode(part.tokens), corpus, size, device)
        yield f"Encoder {encoder.dtype}, {encoder.mode}, {encoder.token_budget:,} tokens a batch", rate, most[0]


def forward_rate(model: Any, corpus: Corpus, batch: int, device: torch.device) -> float:
    """Tokens a second of sentence-transformers' forward alone, on batches of like lengths tokenised in advance."""
    part = corpus.head(min(FORWARDS * batch, len(corpus.texts)))
    texts = [part.texts[i] for i in np.argsort(-part.lengths)]
    batches = [model.preprocess(texts[i : i + batch]) for i in range(0, len(texts), batch)]

    @torch.inference_mode()
    def forward() -> None:
        for features in batches:
            moved = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in features.items()}
            model(moved)["sentence_embedding"].cpu()

    forward()
    return len(part.tokens.ids) / seconds_of(forward, device)


def machine(size: Size, peak: float, device: torch.device) -> Iterator[str]:
    yield f"- Python {platform.python_version()}, " + ", ".join(f"{name} {version(name)}" for name in LIBRARIES)
    if device.type == "cuda":
        facts = torch.cuda.get_device_properties(device)
        yield f"- {facts.name}, {facts.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}"
    else:
        yield "- CPU, tiny sizes: this only shows that the script runs"
    yield f"- measured matmul peak, bf16, {size.matmul}^3: {peak / 1e12:.3g} TFLOP/s"


def one_model(path: Path, name: str, size: Size, peak: float, device: torch.device) -> Iterator[str]:
    spec = read_spec(str(path))
    tokens = int(min(size.tokens, size.tokens * 4e8 / flops_per_token(spec, 100)))
    made = corpora(path, spec, size.long, tokens)
    own = [matmul_rate(max(size.budgets), *shape, device) for shape in _products(spec)]
    yield from ("", f"## {name}", "")
    rates = " and ".join(f"{rate / 1e12:.2f}" for rate in own)
    yield f"Its feed-forward products alone, {max(size.budgets):,} tokens: {rates} TFLOP/s."
    yield ""
    yield from agreement(path, made[0], device)
    for corpus in made:
        yield from ("", f"### {name}, {corpus.name}: {len(corpus.texts):,} texts, mean {corpus.lengths.mean():.0f}", "")
        yield from speed(path, corpus, size, peak, device)


def _products(spec: ModelSpec) -> tuple[tuple[int, int], tuple[int, int]]:
    wide = spec.intermediate_size * (2 if spec.gated else 1)
    return (spec.hidden_size, wide), (spec.intermediate_size, spec.hidden_size)


def lines(size: Size, small: bool, device: torch.device, folder: Path) -> Iterator[str]:
    peak = matmul_rate(size.matmul, size.matmul, size.matmul, device)
    yield from ("# Encoding on one device", "")
    yield f"- `python benchmarks/embed_gpu.py{' --small' if small else ''}`"
    yield from machine(size, peak, device)
    yield "- sentence-transformers tokenises inside `encode`; the Encoder takes token ids, which the CPU stage makes"
    yield from one_model(Path(minilm()), "all-MiniLM-L6-v2, real weights", size, peak, device)
    for shape in SHAPES:
        path = build(shape, folder, small, device)
        yield from one_model(path, f"{shape.name}, random weights", size, peak, device)


@click.command()
@click.option("--small", is_flag=True, help="The same code with tiny sizes on the CPU.")
@click.option("--minutes", default=Size.minutes, show_default=True, help="After which no further measurement begins.")
@click.option("--report", type=click.Path(dir_okay=False), help="Also write the report here.")
def main(small: bool, minutes: float, report: str | None) -> None:
    """Measure the encoder on one CUDA device beside what the device can do and sentence-transformers."""
    if not small and not torch.cuda.is_available():
        raise click.ClickException("no CUDA device is here. Run this on a machine with one, or try it with --small")
    transformers.utils.logging.disable_progress_bar()
    if small:
        torch.set_num_threads(1)
    size, device = (SMALL, torch.device("cpu")) if small else (Size(), torch.device("cuda"))
    ends = time.monotonic() + 60 * minutes
    said = []
    with tempfile.TemporaryDirectory(prefix="embed_gpu_") as folder:
        for line in lines(size, small, device, Path(folder)):
            said.append(line)
            click.echo(line)
            if time.monotonic() > ends:
                said.append(f"\nStopped after {minutes:g} minutes; what would follow is not measured.")
                click.echo(said[-1])
                break
    if report:
        Path(report).write_text("\n".join(said) + "\n")
    if any("FAILED" in line for line in said):
        raise click.ClickException("vectors do not agree")


if __name__ == "__main__":
    main()
