"""Shapes of a model's weights and the size of its vocabulary, read from files without torch."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import ModelError
from .files import read_json

POSITION_TABLE = re.compile(r"(?:^|\.)(?:position_embeddings?|embed_positions|wpe)\.weight$")
HEADER_BYTES = 100 << 20  # of a safetensors file at most, by its format
# The tokens that every tokenizer may name. Another one that it names stands for an image or a sound: no text gives it.
TEXT_TOKENS = {f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")}


def weight_shapes(files: Sequence[Path]) -> dict[str, list[int]]:
    """The shape of each tensor of safetensors files; nothing for torch's own files. Raises ModelError for a damaged one."""
    shapes: dict[str, list[int]] = {}
    for file in files:
        if file.suffix != ".safetensors":
            return {}
        try:
            with file.open("rb") as stream:
                size = int.from_bytes(stream.read(8), "little")
                header = json.loads(stream.read(size) if size <= HEADER_BYTES else b"")
            shapes |= {name: tensor["shape"] for name, tensor in header.items() if name != "__metadata__"}
        except (ValueError, TypeError, KeyError, AttributeError, MemoryError) as error:
            raise ModelError(f"{file} is not a safetensors file: {error}. Fetch the model again.") from error
    return shapes


def has_position_table(shapes: Mapping[str, Sequence[int]]) -> bool:
    """Whether a table with a row a position limits the length; True where the shapes are not known."""
    return not shapes or any(POSITION_TABLE.search(name) for name in shapes)


def check_vocabulary(folder: Path, tokenizer: Mapping[str, Any], rows: int) -> None:
    """Raise ModelError where the tokenizer has a token of a text beyond the `rows` of the embedding table.

    The token of an image or a sound may be beyond them, as in EmbeddingGemma. tokenizer: tokenizer_config.json.
    """
    beyond = {token for token, number in _vocabulary(folder).items() if number >= rows}
    beyond -= set(media_tokens(tokenizer))
    if rows and beyond:
        some = ", ".join(map(repr, sorted(beyond)[:3]))
        raise ModelError(
            f"The tokenizer in {folder} has {len(beyond)} tokens, {some} among them, for which the model has no embedding: "
            f"config.json says vocab_size {rows}. Use the tokenizer of this model, or resize the model's embeddings."
        )


def media_tokens(tokenizer: Mapping[str, Any]) -> list[str]:
    """The tokens of tokenizer_config.json that stand for an image or a sound."""
    extra = tokenizer.get("extra_special_tokens")
    named = {**(extra if isinstance(extra, dict) else {}), **tokenizer}
    return [
        token
        for key, token in named.items()
        if key.endswith("_token") and key not in TEXT_TOKENS and isinstance(token, str)
    ]


def _vocabulary(folder: Path) -> dict[str, int]:
    """The tokens of tokenizer.json or vocab.txt with their numbers; nothing for the formats of other tokenizers."""
    if (file := folder / "tokenizer.json").is_file():
        content = read_json(file)
        tokens = content.get("model", {}).get("vocab") or {}
        pairs = tokens.items() if isinstance(tokens, dict) else ((token[0], i) for i, token in enumerate(tokens))
        return dict(pairs) | {token["content"]: token["id"] for token in content.get("added_tokens", [])}
    if (file := folder / "vocab.txt").is_file():
        return {token: number for number, token in enumerate(file.read_text("utf-8").rstrip("\n").split("\n"))}
    return {}
