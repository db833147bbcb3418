"""Real English text that every machine with Python has: the docstrings of the standard library and of what is installed.

Nothing is downloaded and nothing imported: the files are parsed.
"""

import ast
import hashlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import numpy as np


def python_documents(root: str | None = None) -> Iterator[dict[str, str]]:
    """{id, kind, title, text} for every documented module, class and function under `root` (default: the stdlib)."""
    folder = Path(root or sysconfig.get_path("stdlib"))
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder).with_suffix("").parts
        if {"test", "tests", "idlelib", "lib2to3", "__pycache__"} & set(parts) or (root is None and "site-packages" in parts):
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
            yield from _documents(child, f"{name}.{child.name}", "class" if isinstance(child, ast.ClassDef) else "function")


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
    """`count` texts whose lengths spread log-evenly over about `tokens` WordPiece tokens, cut from real paragraphs."""
    words = " ".join(paragraphs()).split()
    random = np.random.default_rng(seed)
    lengths = np.exp(random.uniform(np.log(tokens[0]), np.log(tokens[1]), count)) / 1.9  # docstrings: 1.9 tokens a word
    starts = random.integers(0, len(words) - 400, count)
    return [" ".join(words[s : s + max(1, int(n))]) for s, n in zip(starts, lengths, strict=True)]
