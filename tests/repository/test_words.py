"""Retired words: everything is named by the word that someone from retrieval would search for."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# A part of a name between underscores, or of a file name; retired word -> the field's.
RETIRED = {
    "crew": "actor pool",
    "shift": "dispatch",
    "hire": "start",
    "hired": "start",
    "dismiss": "stop",
    "stillborn": "failed starts",
    "lent": "borrowed",
    "patience": "retry",
    "heap": "malloc",
    "trees": "directory",
    "ledger": "run",
    "verb": "mapper",
    "bundle": "tables",
    "deal": "partition",
    "dealt": "partitioned",
    "dealing": "partitioning",
    "legs": "intervals",
    "leg": "interval",
    "oddities": "dataset checks",
    "asking": "query",
    "allowing": "filter",
    "finding": "search",
    "misfit": "quantization error",
    "effort": "nprobe, ef_search, search parameter",
    "pieces": "segments",
    "sharpness": "logit scale",
    "peek": "forward_no_grad",
    "sow": "seed_dropout",
    "trainee": "loaded model",
    "found": "a noun: what was found",
    "told": "a noun: what was told",
    "given": "a noun: what was given",
    "made": "a noun: what was made",
    "there": "a noun: what is there",
    "asked": "requested",
    "said": "message",
    "held": "held_out, or a noun",
}


def names_of(path: Path) -> Iterator[tuple[str, int]]:
    """Every identifier that a Python file defines or uses, and every short string, with its line."""
    for node in ast.walk(ast.parse(path.read_text())):
        line = getattr(node, "lineno", 0)
        match node:
            case ast.Name(id=name) | ast.arg(arg=name) | ast.Attribute(attr=name):
                yield name, line
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name) | ast.alias(name=name):
                yield name, line
            case ast.keyword(arg=str(name)):
                yield name, line
            case ast.Constant(value=str(text)) if re.fullmatch(r"[a-z_]+", text):  # a key, a column, a file name
                yield text, line


def words_of(name: str) -> set[str]:
    """The words of snake_case and CamelCase names, in small letters."""
    return {word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)}


def retired(name: str) -> set[str]:
    for allowed in ("FileNotFoundError", "held_out", "HELD_OUT"):
        name = name.replace(allowed, "")
    return words_of(name) & set(RETIRED)


FILES = [path for folder in ("lib", "jobs") for path in sorted((ROOT / folder).rglob("*.py"))]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_retired_word_is_a_name(path):
    """No identifier, key, column or file name of lib and jobs has a retired word in it."""
    hits = {f"{path.name}:{line} {name}: {RETIRED[word]}" for name, line in names_of(path) for word in retired(name)}
    hits |= {f"{path}: {RETIRED[word]}" for word in retired(path.stem)}

    assert not hits


def test_no_option_is_a_retired_word():
    """Nor has an option of a command."""
    from importlib import import_module

    jobs = sorted(path.stem for path in (ROOT / "jobs").glob("*.py"))
    options = {f"{job} {option.name}" for job in jobs for option in import_module(f"jobs.{job}").main.params}

    assert not [option for option in options if retired(option.split()[1])]
