"""Published systems, one file each: everything that a model card fixes, found by the file's name.

A recipe module has a docstring (source, licence, what was verified) and `RECIPE`, a Recipe.
"""

import importlib
import pkgutil
from dataclasses import dataclass

from ..errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What a published system fixes. `None` leaves what the model's own files say."""

    model: str  # hub id
    pooling: str | None = None
    max_tokens: int | None = None
    query_prompt: str = ""
    passage_prompt: str = ""
    text_template: str | None = None
    bidirectional: bool | None = None
    append_eos: bool | None = None
    matryoshka: bool = False


def names() -> list[str]:
    return sorted(module.name.replace("_", "-") for module in pkgutil.iter_modules(__path__))


def load(name: str) -> Recipe:
    """The recipe `NAME`, of the file `NAME.py` (dashes or underscores). Raises UsageError naming those there are."""
    if name.replace("_", "-") not in names():
        raise UsageError(f"no recipe {name!r}. Recipes: {', '.join(names())}")
    module = importlib.import_module(f"{__name__}.{name.replace('-', '_')}")
    return module.RECIPE
