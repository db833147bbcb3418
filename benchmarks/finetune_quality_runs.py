"""Runs of the comparison of trainings on MiniLM: data, teacher, students, evaluations, each kept as a row of results.json."""

import hashlib
import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import psutil

from benchmarks.demo import minilm
from benchmarks.finetune_mining import Row, mine, read_rows, write_rows
from benchmarks.process import ENVIRONMENT, ROOT
from lib.storage.folder import Folder
from lib.training.metrics import read_metrics
from tests.real import tasks

WORKER = "RayTrainWorker"  # in the title of the processes that train
SCORED_AT_ONCE = 4096  # pairs

Options = dict[str, Any]


@dataclass(frozen=True)
class Bench:
    folder: Path
    options: Options

    @property
    def results(self) -> dict[str, Row]:
        path = self.folder / "results.json"
        return json.loads(path.read_text()) if path.exists() else {}

    @property
    def mining(self) -> str:
        """The key of its row."""
        return f"mining-{self.options['rows'] or 'all'}"

    def pairs(self, name: str) -> Path:
        """A file of training pairs."""
        return self.folder / f"{name}-{self.options['rows'] or 'all'}.jsonl"

    def keep(self, key: str, row: Row) -> None:
        path = self.folder / "results.json"
        fresh = path.with_suffix(".new")
        fresh.write_text(json.dumps(self.results | {key: row}, indent=1))
        fresh.rename(path)

    def once(self, key: str, make: Callable[[], Row]) -> Row:
        """The row under this key, made where there is none."""
        if key not in self.results:
            click.echo(f"{key} ...", err=True)
            self.keep(key, make())
            click.echo(f"{key} {self.results[key]}", err=True)
        return self.results[key]


def digest(words: Any) -> str:
    return hashlib.sha256(json.dumps(words).encode()).hexdigest()[:8]


def data(bench: Bench, variant: str) -> Path:
    """The training pairs of a variant, made where they are not there."""
    path = bench.pairs(variant)
    if variant == "distilled":
        path = bench.pairs(f"distilled-{teacher_key(bench)}")
        bench.once(f"scores/{teacher_key(bench)}", lambda: score(bench, path))
    else:
        bench.once(bench.mining, lambda: mine(bench.pairs, bench.options["rows"]))
    return path


# The teacher


def teacher_key(bench: Bench) -> str:
    named = {name: value for name, value in bench.options.items() if name.startswith("teacher_")}
    return digest([named, bench.options["rows"]])


def write_classifier(folder: Path) -> None:
    """MiniLM's weights under a fresh head of one score, always the same."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_pretrained(minilm(), num_labels=1).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(minilm())
    tokenizer.model_max_length = 512
    tokenizer.save_pretrained(folder)


def teacher(bench: Bench) -> Path:
    """The directory of the trained teacher."""
    options, key = bench.options, teacher_key(bench)
    output, begin = bench.folder / f"teacher-{key}", bench.folder / "classifier"

    def make() -> Row:
        if not (begin / "tokenizer_config.json").exists():
            write_classifier(begin)
        line = ["--model", begin, "--data", f"wn-8k={data(bench, 'filtered')}", "--output", output]
        line += ["--loss", "listwise", "--batch", options["teacher_batch"], "--group", options["teacher_group"]]
        line += ["--learning-rate", options["teacher_rate"], "--max-steps", options["teacher_steps"]]
        line += ["--epochs", options["teacher_epochs"], "--passage-tokens", options["teacher_tokens"], "--seed", 0]
        return train(line, output)

    bench.once(f"teacher/{key}", make)
    return output / "model"


def score(bench: Bench, path: Path) -> Row:
    """Write the filtered pairs with the teacher's scores."""
    from lib.models.reranker import Reranker
    from lib.models.reranker_options import RerankerOptions, resolve_reranker

    rows = read_rows(data(bench, "filtered"))
    model, began = teacher(bench), time.perf_counter()
    spec = resolve_reranker(
        RerankerOptions(model=str(model), max_tokens=bench.options["teacher_tokens"], activation="none")
    )
    reranker, format_pairs = Reranker(spec, device="cpu", threads=len(os.sched_getaffinity(0))), spec.pair_format()
    passages = [text for row in rows for text in row["pos"] + row["neg"]]
    counts = [len(row["pos"]) + len(row["neg"]) for row in rows]
    numbers = np.repeat(np.arange(len(rows)), counts)
    found = []
    for start in range(0, len(passages), SCORED_AT_ONCE):
        part = slice(start, start + SCORED_AT_ONCE)
        pairs = format_pairs([rows[number]["query"] for number in numbers[part]], passages[part])
        found.append(reranker.score(pairs, numbers[part]))
    scores = np.split(np.concatenate(found), np.cumsum(counts)[:-1])
    right = 0
    for row, of_row in zip(rows, scores, strict=True):
        given = [round(float(each), 4) for each in of_row]
        row["pos_scores"], row["neg_scores"] = given[: len(row["pos"])], given[len(row["pos"]) :]
        right += max(row["pos_scores"]) > max(row["neg_scores"], default=-np.inf)
    write_rows(path, rows)
    told = {"pairs": len(passages), "positive first": right / len(rows), "dtype": reranker.dtype}
    return told | {"seconds": time.perf_counter() - began}


# Runs


def run(job: str, line: Sequence[object], log: Path) -> dict[int, tuple[str, float]]:
    """Run a job. By process: its title, and the seconds of CPU that it was last seen to have taken; those of the workers
    that train are looked at twice a second. Raises ClickException with the end of the log when it fails."""
    command = [sys.executable, f"jobs/{job}", *map(str, line)]
    seen: dict[int, tuple[str, float]] = {}
    with log.open("a") as file:
        started = psutil.Popen(command, cwd=ROOT, env=os.environ | ENVIRONMENT, stdout=file, stderr=file)
        while started.poll() is None:
            for process in _below(started):
                try:
                    title, times = " ".join(process.cmdline()), process.cpu_times()
                except psutil.Error:
                    continue
                before = seen.get(process.pid, ("", 0.0))[0]
                seen[process.pid] = (before if WORKER in before else title, times.user + times.system)
            time.sleep(0.5)
    if started.returncode:
        raise click.ClickException(f"{shlex.join(command)} ended with {started.returncode}:\n{log.read_text()[-3000:]}")
    return seen


def _below(process: psutil.Process) -> list[psutil.Process]:
    try:
        return [process, *process.children(recursive=True)]
    except psutil.Error:
        return []


def train(line: Sequence[object], output: Path) -> Row:
    """Fine-tune; steps, score and seconds. cpu: of the process that trains, from its start to its end, loading and export
    included; of a run that goes on where one was stopped, clock x threads. clock: of the steps alone."""
    began, goes_on = time.perf_counter(), output.exists()
    seen = run("finetune_model.py", line, output.with_suffix(".log"))
    wall = time.perf_counter() - began
    metrics = read_metrics(Folder(str(output / "metrics")))
    scores = json.loads((output / "scores.json").read_text())[-1]
    workers = [seconds for title, seconds in seen.values() if WORKER in title]
    row: Row = {"steps": metrics.num_rows, "loss": metrics["loss"][-1].as_py()}
    clock, threads = sum(metrics["seconds"].to_pylist()), len(os.sched_getaffinity(0))
    row |= {"cpu": clock * threads if goes_on or not workers else sum(workers), "clock": clock, "threads": threads}
    row |= {"wall": wall, "workers": len(workers), "tokens": sum(metrics["tokens"].to_pylist())}
    row |= {"job cpu": sum(seconds for _, seconds in seen.values()), "command": shlex.join(map(str, line))}
    return row | {"ndcg_at_10": scores.get("ndcg_at_10")}


def job_line(bench: Bench, variant: str, seed: int) -> list[object]:
    """The options of jobs/finetune_model.py for a variant, without the paths of data and output."""
    o = bench.options
    line: list[object] = ["--model", minilm(), "--loss", f"infonce:temperature={o['temperature']}"]
    if variant == "distilled":
        kl = f"kl:temperature={o['temperature']},teacher_temperature={o['distil_temperature']},weight={o['kl_weight']}"
        line += ["--loss", kl]
    group = 1 if variant == "in-batch" else o["group"]
    steps = o["max_steps"] if variant == "in-batch" else o["negative_steps"] or o["max_steps"]
    line += ["--batch", o["batch"], "--group", group, "--epochs", o["epochs"], "--max-steps", steps]
    line += ["--learning-rate", o["learning_rate"], "--dtype", o["dtype"], "--query-tokens", o["query_tokens"]]
    return [*line, "--passage-tokens", o["passage_tokens"], "--seed", seed, "--evaluate-on", tasks.wn8k()]


def key_of(bench: Bench, variant: str, seed: int) -> str:
    """Names a run by all that fixes it."""
    words = [str(word) for word in job_line(bench, variant, seed)[2:]]  # but for the place of the model
    taught = teacher_key(bench) if variant == "distilled" else ""
    return f"{variant}-{seed}-{digest([words, bench.options['rows'], taught])}"


def student(bench: Bench, variant: str, seed: int) -> Row:
    key = key_of(bench, variant, seed)
    output = bench.folder / key

    def make() -> Row:
        line = ["--data", f"wn-8k={data(bench, variant)}", "--output", output, *job_line(bench, variant, seed)]
        return train(line, output)

    return bench.once(key, make)


def evaluated(bench: Bench, name: str, line: Sequence[object]) -> Row:
    """NDCG@10 of models as they are."""
    output = bench.folder / "evaluation"
    output.mkdir(exist_ok=True)
    fixed = ["--dataset", tasks.wn8k(), "--output", output, "--name", name, "--dtype", "float32"]
    seen = run("evaluate_model.py", [*line, *fixed], bench.folder / f"{name}.log")
    (found,) = (output / "results" / name).glob("wn-8k.json")
    scores = json.loads(found.read_text())["scores"]
    return {"ndcg_at_10": scores["ndcg_at_10"], "job cpu": sum(seconds for _, seconds in seen.values())}


def base(bench: Bench) -> Row:
    return bench.once("base", lambda: evaluated(bench, "base", ["--model", minilm()]))


def teacher_alone(bench: Bench) -> Row:
    """The teacher on what the base model retrieves."""
    top, key = bench.options["rerank_top"], teacher_key(bench)
    line = ["--model", minilm(), "--reranker", teacher(bench), "--rerank-top", top]
    return bench.once(f"teacher-top-{top}/{key}", lambda: evaluated(bench, f"teacher-{top}-{key}", line))
