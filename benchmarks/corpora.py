"""Real English text that every machine with Python has: the docstrings of the standard library and of what is installed.

Nothing is downloaded and nothing imported: the files are parsed.
"""

import ast
import hashlib
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import numpy as np


def python_documents(root: str | None = None) -> Iterator[dict[str, str]]:
    """{id, kind, title, text} for every documented module, class and function under `root` (default: the stdlib)."""
    folder = Path(root or sysconfig.get_path("stdlib"))
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder).with_suffix("").parts
        if {"test", "tests", "idlelib", "lib2to3", "__pycache__"} & set(parts) or (
            root is None and "site-packages" in parts
        ):
            continue
        module = ".".join(part for part in parts if part != "__init__")
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError, ValueError):
            continue
        yield from _documents(tree, module or "builtins", "module")


def _documents(node: ast.AST, name: str, kind: str) -> Iterator[dict[str, str]]:
    text = ast.get_docstring(node) if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) else None
    if text:
        yield {"id": name, "kind": kind, "title": name.rsplit(".", 1)[-1], "text": text}
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef):
            yield from _documents(
                child, f"{name}.{child.name}", "class" if isinstance(child, ast.ClassDef) else "function"
            )


def paragraphs(least: int = 4, most: int = 320) -> list[str]:
    """Distinct paragraphs of `least` to `most` words from every docstring at hand, in an order fixed by their hashes."""
    seen: dict[str, str] = {}
    for root in (None, sysconfig.get_path("purelib")):
        for document in python_documents(root):
            for block in document["text"].split("\n\n"):
                text = " ".join(block.split())
                if least <= text.count(" ") + 1 <= most:
                    seen.setdefault(hashlib.sha256(text.encode()).hexdigest(), text)
    return [seen[key] for key in sorted(seen)]


def mixed_lengths(count: int, tokens: tuple[int, int] = (5, 400), seed: int = 7) -> list[str]:
    """`count` texts of about `tokens` WordPiece tokens: log-normal, half of them under 30, about 46 in the mean.

    Cut at random places from the prose of the standard library's docstrings, so the same Python gives the same texts.
    """
    prose = " ".join(document["text"] for document in python_documents()).split()
    random = np.random.default_rng(seed)
    lengths = np.clip(random.lognormal(np.log(30), 1.0, count), *tokens)
    ends = np.cumsum([_word_pieces(word) for word in prose])
    starts = random.integers(0, np.searchsorted(ends, ends[-1] - tokens[1]), count)
    stops = np.searchsorted(ends, ends[starts] + lengths - 2)  # [CLS] and [SEP] are the other two
    return [" ".join(prose[start : max(stop, start + 1)]) for start, stop in zip(starts, stops, strict=True)]


def _word_pieces(word: str) -> int:
    """About how many WordPiece tokens a word is: one a punctuation mark, one for every six letters begun."""
    pieces = re.findall(r"[^\W_]+|[\W_]", word)
    return sum(1 + (len(piece) - 1) // 6 for piece in pieces)
