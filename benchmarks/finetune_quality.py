"""What fine-tuning does to MiniLM on wn-8k, by our own jobs: in-batch negatives, mined ones, filtered ones, distillation.

    python benchmarks/finetune_quality.py --only base
    python benchmarks/finetune_quality.py --only in-batch --seeds 0
    ...                                   # or everything there is at once, without --only
    python benchmarks/finetune_quality.py --only none --report benchmarks/finetune_quality.md

in-batch   InfoNCE; the passages of the other rows are the negatives
hard       and negatives from those that the base model ranks 2 to 30 for the query, its own positives left out
filtered   the same, but none whose cosine is over 0.95 x that of the query's positive; the next in rank take their places
distilled  the filtered negatives with a teacher's scores, and their softmax learned beside InfoNCE (`kl`)
teacher    a cross-encoder that jobs/finetune_model.py trains once on the filtered negatives (`listwise`), and what it
           makes of the base model's first passages

Training and mining see the queries of qrels/train.tsv alone; evaluation is of the held-out ones. Every run is a row of
results.json in --folder: what is there is not done again, and a run that was stopped goes on.
"""

import hashlib
import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import click
import numpy as np
import psutil

from benchmarks.demo import minilm
from benchmarks.process import ENVIRONMENT, ROOT
from benchmarks.reporting import machine, verdict
from lib.storage.folder import Folder
from lib.training.metrics import read_metrics
from tests.real import tasks

VARIANTS = ("in-batch", "hard", "filtered", "distilled")
PARTS = ("base", *VARIANTS, "teacher")
BASE, GAIN, MOST_SECONDS = 0.3511, 0.0315, 300.0
WORKER = "RayTrainWorker"  # in the title of the processes that train
NEGATIVES, MARGIN = 7, 0.95
RANKS = 2, 30  # the best is 1; both are in
MINED_AT_ONCE = 1024  # queries
SCORED_AT_ONCE = 4096  # pairs

NOTES = """Differences are of equal seeds.
CPU s: user and system of the process that trains, from its start to its end, loading and export included; of steps: the
clock of the steps alone, times the threads."""

Options = dict[str, Any]
Row = dict[str, Any]


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


# Mining


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    fresh = path.with_suffix(".new")
    with fresh.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    fresh.rename(path)


def read_rows(path: Path) -> list[Row]:
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def ranked(queries: list[str], passages: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and places of all passages by the base model, best first: [queries, passages] each."""
    from lib.index.exact.topk import exact_top_k
    from lib.models.encoder import Encoder
    from lib.models.spec_reader import read_spec
    from lib.models.tokenizer import Tokenizer

    threads, spec = len(os.sched_getaffinity(0)), read_spec(minilm())
    encoder, tokenizer = Encoder(spec, dtype="float32", device="cpu", threads=threads), Tokenizer(spec)
    asked, held = (encoder.encode(tokenizer(texts)) for texts in (queries, passages))
    search, places = exact_top_k("cpu", threads), np.arange(len(held))
    starts = range(0, len(asked), MINED_AT_ONCE)
    found = [search(asked[start : start + MINED_AT_ONCE], held, places, len(held)) for start in starts]
    scores, order = zip(*found, strict=True)
    return np.concatenate(scores), np.concatenate([each.astype(np.int32) for each in order])


def candidates(scores: np.ndarray, places: np.ndarray, own: np.ndarray, filtered: bool) -> np.ndarray:
    """Places of the passages that may be a query's negatives. own: places of its positives.

    Ranks 2 to 30 of all passages; filtered, as many of those that are not over the ceiling, from rank 2 on.
    """
    mine = np.isin(places, own)
    first, last = RANKS
    if not filtered:
        window = slice(first - 1, last)
        return places[window][~mine[window]]
    fit = ~mine & (scores <= MARGIN * scores[mine].max())
    fit[: first - 1] = False
    return places[fit][: last - first + 1]


def mine(bench: Bench) -> Row:
    """The files of pairs of `in-batch`, `hard` and `filtered`; what was found."""
    began = time.perf_counter()
    folder = tasks.wn8k()
    pairs = tasks.training_pairs(folder)[: bench.options["rows"]]
    corpus = list(tasks.texts(folder / "corpus.jsonl").values())
    place = {text: number for number, text in enumerate(corpus)}
    scores, order = ranked([query for query, _ in pairs], corpus)
    told: Row = {"rows": len(pairs)}
    for name in ("hard", "filtered"):
        random, rows, short, emptied = np.random.default_rng(0), [], 0, 0
        for (query, good), of_query, ranks in zip(pairs, scores, order, strict=True):
            own = np.array([place[text] for text in good])
            found = candidates(of_query, ranks, own, name == "filtered")
            emptied += not np.isin(found, ranks[: RANKS[1]]).any()
            short += len(found) < NEGATIVES
            taken = random.permutation(found)[:NEGATIVES]
            rows.append({"query": query, "pos": good, "neg": [corpus[each] for each in taken]})
        write_rows(bench.pairs(name), rows)
        told[f"{name}: rows with fewer than {NEGATIVES}"] = short
        told[f"{name}: rows without any of rank {RANKS[1]} or better"] = emptied
    write_rows(bench.pairs("in-batch"), [{"query": query, "pos": good} for query, good in pairs])
    return told | {"seconds": time.perf_counter() - began}


def data(bench: Bench, variant: str) -> Path:
    """The training pairs of a variant, made where they are not there."""
    path = bench.pairs(variant)
    if variant == "distilled":
        path = bench.pairs(f"distilled-{teacher_key(bench)}")
        bench.once(f"scores/{teacher_key(bench)}", lambda: score(bench, path))
    else:
        bench.once(bench.mining, lambda: mine(bench))
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
    for row, mine in zip(rows, scores, strict=True):
        given = [round(float(each), 4) for each in mine]
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
    """What jobs/finetune_model.py is told, but for the data's and the output's place."""
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


# The report


def spread(values: Sequence[float], form: str = "{:.4f}") -> str:
    """Mean (least - most)."""
    return "{} ({} - {})".format(*(form.format(value) for value in (mean(values), min(values), max(values))))


def compose(bench: Bench, seeds: Sequence[int], head: list[str]) -> str:
    results = bench.results
    runs = {
        variant: {seed: results[key] for seed in seeds if (key := key_of(bench, variant, seed)) in results}
        for variant in VARIANTS
    }
    start = results["base"]["ndcg_at_10"] if "base" in results else BASE
    lines = [*head, "", f"Before training: NDCG@10 {start:.4f}. Mean (least - most) of the seeds. {NOTES}", ""]
    lines += ["| variant | runs | NDCG@10 | over the base | over in-batch | steps | CPU s | CPU s of steps |"]
    lines += ["|---|---|---|---|---|---|---|---|"]
    for variant, done in runs.items():
        if done:
            lines.append(f"| {variant} | {len(done)} | {' | '.join(_cells(done, runs['in-batch'], start))} |")
    return "\n".join([*lines, *_bars(runs["in-batch"], start), *_costs(bench), *_commands(runs)]) + "\n"


def _cells(done: dict[int, Row], plain: dict[int, Row], start: float) -> list[str]:
    values = {seed: row["ndcg_at_10"] for seed, row in done.items()}
    over = [value - plain[seed]["ndcg_at_10"] for seed, value in values.items() if seed in plain]
    gains = [value - start for value in values.values()]
    steps = {row["steps"] for row in done.values()}
    cells = [spread(list(values.values())), spread(gains, "{:+.4f}"), spread(over, "{:+.4f}") if over else ""]
    cells += [" ".join(map(str, sorted(steps))), spread([row["cpu"] for row in done.values()], "{:.0f}")]
    return [*cells, spread([row["clock"] * row["threads"] for row in done.values()], "{:.0f}")]


def _bars(done: dict[int, Row], start: float) -> list[str]:
    if not done:
        return []
    gain, most = mean(row["ndcg_at_10"] for row in done.values()) - start, max(row["cpu"] for row in done.values())
    lines = ["", "| bar | asked | measured | |", "|---|---|---|---|"]
    lines.append(f"| in-batch over the base, mean | >= {GAIN} | {gain:.4f} | {verdict(gain >= GAIN)} |")
    lines.append(f"| in-batch, CPU s at most | <= {MOST_SECONDS:.0f} | {most:.0f} | {verdict(most <= MOST_SECONDS)} |")
    return lines


def _costs(bench: Bench) -> list[str]:
    """What comes before the training of a variant."""
    results, key, top = bench.results, teacher_key(bench), bench.options["rerank_top"]
    lines = ["", "What comes before:", ""]
    if (row := results.get(bench.mining)) is not None:
        counts = "; ".join(f"{name} {value:,}" for name, value in row.items() if name != "seconds")
        lines.append(f"- mining, for `hard` and all below it: {row['seconds']:.0f} s by the clock; {counts}")
    if (row := results.get(f"teacher/{key}")) is not None:
        said = f"{row['steps']} steps, {row['cpu']:.0f} CPU s"
        lines.append(f"- the teacher, for `distilled`: {said}: `python jobs/finetune_model.py {row['command']}`")
    if (row := results.get(f"scores/{key}")) is not None:
        lines.append(
            f"- its scores, in {row['dtype']}: {row['pairs']:,} pairs, {row['seconds']:.0f} s by the clock; it puts a "
            f"positive first in {row['positive first']:.1%} of the rows that it learned from"
        )
    if (row := results.get(f"teacher-top-{top}/{key}")) is not None:
        lines.append(f"- it makes NDCG@10 {row['ndcg_at_10']:.4f} of the base model's first {top} passages")
    return lines


def _commands(runs: dict[str, dict[int, Row]]) -> list[str]:
    lines = ["", "Commands, of the first seed each:", ""]
    return lines + [
        f"    python jobs/finetune_model.py {next(iter(done.values()))['command']}" for done in runs.values() if done
    ]


@click.command()
@click.option("--folder", default=".tasks/finetune-quality", show_default=True, help="Data, runs and results.json.")
@click.option("--only", default=",".join(PARTS), show_default=True, help="What to do, by commas, or none.")
@click.option("--seeds", default="0,1,2", show_default=True, help="By commas.")
@click.option("--rows", type=int, help="Training queries, the first of them. Default: all.")
@click.option("--batch", default=128, show_default=True)
@click.option("--group", default=2, show_default=True, help="Passages a query where there are negatives.")
@click.option("--epochs", default=2, show_default=True, help="Passes that the steps are taken of.")
@click.option("--max-steps", default=75, show_default=True, help="95 of 128 rows are an epoch.")
@click.option("--negative-steps", type=int, help="Steps where there are negatives. Default: --max-steps.")
@click.option("--dtype", default="auto", show_default=True, help="Of training and its evaluation: auto is float32.")
@click.option("--learning-rate", default=5e-5, show_default=True)
@click.option("--temperature", default=0.05, show_default=True)
@click.option("--query-tokens", default=32, show_default=True)
@click.option("--passage-tokens", default=64, show_default=True)
@click.option("--kl-weight", default=1.0, show_default=True)
@click.option("--distil-temperature", default=1.0, show_default=True, help="Of the teacher's scores.")
@click.option("--teacher-batch", default=32, show_default=True)
@click.option("--teacher-group", default=8, show_default=True)
@click.option("--teacher-epochs", default=1, show_default=True)
@click.option("--teacher-steps", default=300, show_default=True)
@click.option("--teacher-rate", default=5e-5, show_default=True)
@click.option("--teacher-tokens", default=96, show_default=True, help="Of a pair.")
@click.option("--rerank-top", default=20, show_default=True, help="Passages that the teacher is evaluated on.")
@click.option("--report", "path", type=click.Path(dir_okay=False), help="Write the report here.")
def main(folder: str, only: str, seeds: str, path: str | None, **options: Any) -> None:
    """Do what is not done yet, and print the report."""
    load, bench = os.getloadavg(), Bench((ROOT / folder).resolve(), options)
    bench.folder.mkdir(parents=True, exist_ok=True)
    wanted = [] if only == "none" else only.split(",")
    if unknown := sorted(set(wanted) - set(PARTS)):
        raise click.UsageError(f"--only {','.join(unknown)}: choose from {', '.join(PARTS)}, none")
    numbers = [int(seed) for seed in seeds.split(",")]
    if "base" in wanted:
        base(bench)
    for seed in numbers:
        for variant in VARIANTS:
            if variant in wanted:
                student(bench, variant, seed)
    if "teacher" in wanted:
        teacher_alone(bench)
    head = [f"# Fine-tuning MiniLM on wn-8k, {len(os.sched_getaffinity(0))} cores", ""]
    given = [param.name or "" for param in click.get_current_context().command.params if param.name in options]
    said = " ".join(f"--{name.replace('_', '-')} {options[name]}" for name in given if options[name] is not None)
    head += [f"- `python benchmarks/finetune_quality.py --seeds {seeds} {said}`, all-MiniLM-L6-v2", *machine(load)]
    text = compose(bench, numbers, head).replace(minilm(), "MINILM").replace(f"{ROOT}/", "")
    click.echo(text)
    if path:
        Path(path).write_text(text)


if __name__ == "__main__":
    main()
