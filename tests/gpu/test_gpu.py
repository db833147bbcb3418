"""What runs on a CUDA device, held against the same on this machine's CPU; skipped where there is no device."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from lib.index.exact.topk import exact_top_k
from lib.models import attention
from lib.models.encoder import Encoder
from lib.models.packing import length_groups, offsets_of
from lib.models.reranker import Reranker
from lib.models.spec_reader import read_spec
from lib.models.tokenizer import Tokenizer
from tests.models.test_reranker import pairs, spec_of
from tests.support import ranks, tiny
from tests.support.embedded import TEXTS, write_docs
from tests.support.ranks import Case
from tests.support.reference import cosines
from tests.support.trained import write_pairs

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is here")
ROOT = Path(__file__).parents[2]
LENGTHS = np.array([97, 64, 64, 31, 9, 9, 9, 1])
TOKENS = int(LENGTHS.sum())
EMBEDDERS = sorted(set(tiny.MODELS) - {"mpnet", "t5"})
RERANKERS = ["bert", "xlm-roberta", "modernbert", "qwen3-classifier", "qwen3", "gemma"]


def layout(device: str) -> attention.Layout:
    offsets = offsets_of(LENGTHS)
    groups = tuple(length_groups(offsets, None))
    return attention.Layout(torch.tensor(offsets, dtype=torch.int32, device=device), int(LENGTHS.max()), groups)


def states(heads: int, seed: int, dim: int = 64) -> torch.Tensor:
    """Of 16 bits, as float64 on the host."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, heads, TOKENS, dim, generator=generator).bfloat16().double()


def attended(device: str, dtype: torch.dtype, key_heads: int, **asked: Any) -> list[torch.Tensor]:
    """Output, and the gradients of query, key and value, float64 on the host."""
    given = [
        states(heads, seed).to(device, dtype).requires_grad_() for seed, heads in enumerate((4, key_heads, key_heads))
    ]
    output, _ = attention.packed_attention(torch.nn.Module(), *given, None, packed=layout(device), **asked)
    (output * states(4, 9).transpose(1, 2).to(device, dtype)).sum().backward()
    return [tensor.detach().cpu().double() for tensor in (output, *(each.grad for each in given))]


@pytest.mark.parametrize("key_heads", [4, 2])
@pytest.mark.parametrize(
    "asked", [{}, {"is_causal": True}, {"sliding_window": 8}, {"is_causal": True, "sliding_window": 8}]
)
def test_the_kernel_is_the_attention_of_the_cpu(asked: dict[str, Any], key_heads: int) -> None:
    """Outputs and gradients of 16 bits within 1 % of float64: both ways, causal, windows, fewer heads of keys."""
    asked = {"is_causal": False} | asked
    for found, expected in zip(
        attended("cuda", torch.bfloat16, key_heads, **asked),
        attended("cpu", torch.float64, key_heads, **asked),
        strict=True,
    ):
        assert float((found - expected).norm() / expected.norm()) < 0.01


def test_the_kernels_dropout_is_drawn_from_the_seed() -> None:
    """The same seed, the same bits; the mean of many is attention without dropout; the backward drops what the forward did."""
    query, key, value = (states(4, seed).to("cuda", torch.bfloat16) for seed in range(3))
    weight = states(4, 9).transpose(1, 2).cuda()

    def drawn(seed: int, dropout: float = 0.2) -> tuple[torch.Tensor, torch.Tensor]:
        torch.manual_seed(seed)
        leaf = value.clone().requires_grad_()
        output, _ = attention.packed_attention(
            torch.nn.Module(), query, key, leaf, None, packed=layout("cuda"), is_causal=False, dropout=dropout
        )
        (output.double() * weight).sum().backward()
        assert leaf.grad is not None
        return output.detach().double(), leaf.grad.double()

    first, gradient = drawn(1)
    torch.randn(10, device="cuda")
    assert torch.equal(first, drawn(1)[0])
    assert not torch.equal(first, drawn(2)[0])
    # the output is linear in the values, whatever was dropped
    product, expected = float((gradient * value.double()).sum()), float((first * weight).sum())
    assert abs(product - expected) < 0.05 * float((first * weight).norm())
    whole, _ = drawn(1, dropout=0.0)
    mean = torch.stack([drawn(seed)[0] for seed in range(200)]).mean(0)
    assert float((mean - whole).norm() / whole.norm()) < 0.1
    assert float((first - whole).norm() / whole.norm()) > 0.2


@pytest.mark.parametrize("kind", EMBEDDERS)
def test_vectors_are_those_of_the_cpu(kind: str, tmp_path: Path) -> None:
    """float32 within 1e-4; bfloat16 by the kernel at a cosine over 0.99 each; packed on both."""
    spec = read_spec(str(tiny.build(kind, tmp_path / "model")))
    tokens = Tokenizer(spec)(TEXTS[:60])
    expected = Encoder(spec, dtype="float32", device="cpu").encode(tokens)
    exact, half = Encoder(spec, dtype="float32", device="cuda"), Encoder(spec, dtype="bfloat16", device="cuda")

    assert exact.mode == half.mode == "packed"
    np.testing.assert_allclose(exact.encode(tokens), expected, atol=1e-4)
    assert cosines(half.encode(tokens), expected).min() > 0.99
    np.testing.assert_array_equal(half.encode(tokens), half.encode(tokens))


@pytest.mark.parametrize("kind", RERANKERS)
def test_scores_are_those_of_the_cpu(kind: str, tmp_path: Path) -> None:
    """float32 within 1e-3, bfloat16 in the same order nearly, shared beginnings among them."""
    folder = tiny.build_reranker(kind, tmp_path / "model")
    queries, passages, groups = pairs(200)
    spec = spec_of(kind, folder)
    given = spec.pair_format()(queries, passages)
    expected = Reranker(spec, dtype="float32", device="cpu").score(given, groups)
    exact = Reranker(spec, dtype="float32", device="cuda").score(given, groups)
    half = Reranker(spec, dtype="bfloat16", device="cuda").score(given, groups)

    np.testing.assert_allclose(exact, expected, atol=1e-3)
    assert np.corrcoef(half, expected)[0, 1] > 0.99


def test_the_nearest_are_those_of_the_cpu() -> None:
    """torch's search on the device finds what faiss finds on the CPU."""
    rng = np.random.default_rng(0)
    queries, passages = (rng.standard_normal((n, 64)).astype(np.float32) for n in (300, 200_000))
    ranks_of = np.arange(len(passages))
    scores, found = exact_top_k("cuda", 1)(queries, passages, ranks_of, 100)
    expected, order = exact_top_k("cpu", 4)(queries, passages, ranks_of, 100)

    np.testing.assert_allclose(scores, expected, atol=1e-4)
    assert (found == order).mean() > 0.999


@pytest.mark.parametrize("loss", ["infonce", "gte", "cosent", "m3-unified", "listwise"])
def test_a_steps_gradients_are_those_of_the_cpu(loss: str, tmp_path: Path) -> None:
    """In float64 without dropout within 1e-9, in chunks, through two passes or one."""
    model = tiny.build("bert", tmp_path / "model")
    change = json.loads((model / "config.json").read_text())
    change |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (model / "config.json").write_text(json.dumps(change))
    case = Case(loss)
    value, expected = ranks.plain(case, model)
    found = ranks.step_of(case, model, 0, torch.device("cuda"))

    assert abs(found["loss"] - value) < 1e-9 * abs(value)
    assert float((found["gradients"].cpu() - expected).norm() / expected.norm()) < 1e-9


def run_job(name: str, *words: Any) -> str:
    line = [sys.executable, f"jobs/{name}.py", *map(str, words)]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


def test_the_embed_job_takes_the_device(tmp_path: Path) -> None:
    """A worker of one GPU, bfloat16, every row once, vectors as the CPU has them."""
    model = tiny.build("bert", tmp_path / "model")
    docs, output = write_docs(tmp_path), tmp_path / "vectors"
    said = run_job("embed_corpus", "--input", docs, "--output", output, "--model", model)
    table = pa.concat_tables(
        pq.read_table(file, columns=["id", "embedding"]) for file in sorted(output.glob("part-*.parquet"))
    )
    spec = read_spec(str(model))
    expected = Encoder(spec, dtype="float32", device="cpu").encode(Tokenizer(spec)(TEXTS))

    assert "1 GPU" in said
    assert table["id"].to_pylist() == [f"d{i}" for i in range(300)]
    assert cosines(np.array(table["embedding"].to_pylist(), dtype=np.float32), expected).min() > 0.99


def test_the_finetune_job_takes_the_device(tmp_path: Path) -> None:
    """A Ray Train worker of one GPU with bfloat16 layers learns, stops, goes on, and leaves a model that embeds."""
    model = tiny.build("bert", tmp_path / "model")
    data = write_pairs(tmp_path / "pairs.jsonl", rows=400)
    words = ["--model", model, "--data", data, "--output", tmp_path / "run", "--loss", "infonce:temperature=0.05"]
    words += ["--batch", 32, "--epochs", 3, "--learning-rate", 1e-3]
    said = run_job("finetune_model", *words)
    metrics = pa.concat_tables(pq.read_table(f) for f in (tmp_path / "run" / "metrics").rglob("*.parquet"))
    losses = metrics.sort_by("step")["loss"].to_pylist()
    spec = read_spec(str(tmp_path / "run" / "model"))

    assert "1 GPU" in said
    assert np.mean(losses[-5:]) < 0.9 * np.mean(losses[:5])
    assert np.isfinite(Encoder(spec, device="cuda").encode(Tokenizer(spec)(TEXTS[:20]))).all()
