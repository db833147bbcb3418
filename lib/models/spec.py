"""What fixes a model's vectors, read from its files as JSON: neither torch nor transformers is imported here.

read_spec -> ModelSpec     the driver: checks the model in seconds, before anything scales
tokenizer.Tokenizer        texts -> Tokens                 (CPU stage)
encoder.Encoder            Tokens -> vectors               (CPU or GPU worker)
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..errors import ModelError
from . import files, modules_json

# Position tables of these families begin after the padding row: pad_token_id + 1 of their positions are never used.
OFFSET_POSITIONS = frozenset(
    {
        "camembert",
        "data2vec-text",
        "longformer",
        "mpnet",
        "roberta",
        "roberta-prelayernorm",
        "xlm-roberta",
        "xlm-roberta-xl",
        "xmod",
    }
)
WIDTHS = ("hidden_size", "d_model", "dim", "n_embd")  # the hidden size in different configurations
UNLIMITED = 10**20  # transformers writes 1e30 where a tokenizer has no limit


class Tokens(NamedTuple):
    """Token ids of many texts laid end to end.

    ids: int32 [tokens], special tokens included. offsets: int64 [n + 1], text i is ids[offsets[i]:offsets[i + 1]].
    truncated: bool [n], whether the text had more tokens than the model takes.
    """

    ids: np.ndarray
    offsets: np.ndarray
    truncated: np.ndarray


@dataclass(frozen=True)
class ModelSpec:
    """Everything that decides the vectors of a model directory. Plain values: pickles, JSON by dataclasses.asdict."""

    name: str  # as asked for: a path or a hub id
    path: str  # local directory with the files
    revision: str  # hub commit, or "weights-" and 12 hex digits of a fingerprint of the files
    subfolder: str  # of `path`, where config, weights and tokenizer lie; "" for the directory itself
    architecture: str
    model_type: str
    hidden_size: int
    dim: int  # of the output vectors
    max_tokens: int  # special tokens included
    pooling: tuple[str, ...]  # several modes are concatenated
    include_prompt: bool  # whether a prompt's tokens take part in the pooling
    dense: tuple[str, ...]  # subfolders of the layers after the pooling, in order
    normalize: bool
    truncate_dim: int | None
    prompts: dict[str, str]
    default_prompt_name: str | None
    bidirectional: bool  # a decoder that must run with is_causal=False
    append_eos: bool  # the tokenizer's configuration asks for an end-of-sequence token
    lower_case: bool
    padding_side: str
    weight_bytes: int  # on disk
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate_size: int
    gated: bool  # feed-forward with three matrices rather than two

    @property
    def folder(self) -> str:
        """Directory of config, weights and tokenizer."""
        return str(Path(self.path) / self.subfolder)


def read_spec(
    model: str,
    *,
    revision: str | None = None,
    pooling: str | Sequence[str] | None = None,
    normalize: bool | None = None,
    max_tokens: int | None = None,
    truncate_dim: int | None = None,
    bidirectional: bool | None = None,
    append_eos: bool | None = None,
    parts: modules_json.StModules | None = None,
) -> ModelSpec:
    """Read a sentence-transformers directory, a plain transformers checkpoint, or a hub id.

    What is not asked for comes from the model's files, as sentence-transformers 6.2 reads them; a checkpoint without
    modules.json is pooled by mean (a causal language model by its last token) and not normalised. Chat templates are
    never applied. parts: what is already known of modules.json. Raises ModelError when the files are missing, or do not
    allow what is asked for.
    """
    root = files.locate(model, revision)
    parts = parts or modules_json.read(root)
    folder = root / parts.subfolder
    checked = files.check(folder)
    config = files.read_json(folder / "config.json")
    text = config.get("text_config") or config
    tokens = files.read_json(folder / "tokenizer_config.json", {})
    head = files.read_json(root / "config_sentence_transformers.json", {})
    turned = _bidirectional(config, text, parts, bidirectional, folder)
    modes = (
        modules_json.pooling_modes(pooling)
        if pooling is not None
        else parts.pooling or _default_pooling(config, turned)
    )
    sizes = _sizes(text)
    if not sizes["hidden_size"]:
        raise ModelError(f"{folder}/config.json names no width under any of {', '.join(WIDTHS)}. Shoal cannot size it.")
    width = parts.width or sizes["hidden_size"] * len(modes)
    cut = truncate_dim if truncate_dim is not None else head.get("truncate_dim")
    _check_truncation(root, config, head, cut, width)
    return ModelSpec(
        name=model,
        path=str(root),
        revision=files.revision(root, folder, checked, parts.dense),
        subfolder=parts.subfolder,
        architecture=(config.get("architectures") or [config.get("model_type", "unknown")])[0],
        model_type=config.get("model_type", "unknown"),
        dim=cut or width,
        max_tokens=_max_tokens(config, text, parts, tokens, max_tokens),
        pooling=modes,
        include_prompt=parts.include_prompt,
        dense=parts.dense,
        normalize=parts.normalize if normalize is None else normalize,
        truncate_dim=cut,
        prompts={name: prompt or "" for name, prompt in head.get("prompts", {}).items()},
        default_prompt_name=head.get("default_prompt_name"),
        bidirectional=turned,
        append_eos=bool(tokens.get("add_eos_token", False)) if append_eos is None else append_eos,
        lower_case=parts.lower_case,
        padding_side=tokens.get("padding_side", "right"),
        weight_bytes=sum(file.stat().st_size for file in checked),
        **sizes,
    )


def on_this_machine(spec: ModelSpec) -> ModelSpec:
    """The spec with the files' place here: a worker on another node fetches a hub model that the driver has read.

    Raises ModelError for a directory that only the driver's machine has.
    """
    if Path(spec.path).is_dir():
        return spec
    if "://" in spec.name:
        return replace(spec, path=str(files.locate(spec.name, None)))
    if Path(spec.name).expanduser().is_absolute() or spec.revision.startswith("weights-"):
        raise ModelError(
            f"The model directory {spec.path} is on the driver's machine and not on this node. Put it at the same path on "
            "every node (a shared file system, or the image), or give a hub id."
        )
    return replace(spec, path=str(files.locate(spec.name, spec.revision)))


def flops_per_token(spec: ModelSpec, length: int) -> float:
    """FLOP of one token in a text of `length` tokens: two for each multiply-add of the matrices and of attention."""
    attention = 2 * (spec.heads + spec.kv_heads) * spec.head_dim * spec.hidden_size
    feed_forward = (3 if spec.gated else 2) * spec.hidden_size * spec.intermediate_size
    seen = length / 2 if spec.architecture.endswith("ForCausalLM") and not spec.bidirectional else length
    return 2.0 * spec.layers * (attention + feed_forward + 2 * seen * spec.heads * spec.head_dim)


def _sizes(text: Mapping[str, Any]) -> dict[str, Any]:
    """The shape of the network under the several names that configurations give it."""

    def first(*names: str) -> int:
        return next((text[name] for name in names if text.get(name) is not None), 0)

    hidden, heads = first(*WIDTHS), first("num_attention_heads", "num_heads", "n_heads", "n_head") or 1
    return {
        "hidden_size": hidden,
        "layers": first("num_hidden_layers", "num_layers", "n_layers", "n_layer"),
        "heads": heads,
        "kv_heads": first("num_key_value_heads") or heads,
        "head_dim": first("head_dim", "d_kv") or hidden // heads,
        "intermediate_size": first("intermediate_size", "d_ff", "hidden_dim", "n_inner", "d_inner") or 4 * hidden,
        "gated": text.get("hidden_act") == "silu" or text.get("model_type") in ("modernbert", "gemma3_text"),
    }


def _default_pooling(config: Mapping[str, Any], bidirectional: bool) -> tuple[str, ...]:
    """sentence-transformers' choice for a checkpoint without modules.json."""
    causal = (config.get("architectures") or [""])[0].endswith("ForCausalLM") and not bidirectional
    return ("lasttoken",) if causal else ("mean",)


def _bidirectional(
    config: Mapping[str, Any], text: Mapping[str, Any], parts: modules_json.StModules, asked: bool | None, folder: Path
) -> bool:
    """Whether a decoder runs without its causal mask: asked for, or said by the files.

    A model that brings its own code is refused until the caller decides, because transformers' own class of that type
    loads in its place without a word, and would be causal where the brought code is not.
    """
    if asked is not None:
        return asked
    own_code = (config.get("auto_map") or {}).get("AutoModel")
    if own_code:
        raise ModelError(
            f"{folder}/config.json names its own model code ({own_code}), which Shoal does not run. If transformers' "
            f"{config.get('model_type')!r} is the same network, say so with bidirectional=True (no causal mask, as "
            "gte-Qwen2) or bidirectional=False (the mask that transformers gives it)."
        )
    return next(
        (
            said is False
            for said in (parts.is_causal, config.get("is_causal"), text.get("is_causal"))
            if said is not None
        ),
        False,
    )


def _max_tokens(
    config: Mapping[str, Any],
    text: Mapping[str, Any],
    parts: modules_json.StModules,
    tokens: Mapping[str, Any],
    asked: int | None,
) -> int:
    """Tokens that a text may have: asked for, or declared by the files and within the model's positions."""
    limit = text.get("max_position_embeddings") or UNLIMITED
    limit = UNLIMITED if limit < 0 else limit
    if config.get("model_type") in OFFSET_POSITIONS:
        limit -= (config.get("pad_token_id") or 0) + 1
    if asked is not None:
        if not 1 <= asked <= limit:
            raise ModelError(
                f"max_tokens={asked} is outside what this model takes: 1 to {limit}. Ask for a number in that range."
            )
        return asked
    declared = parts.max_tokens or int(tokens.get("model_max_length") or UNLIMITED)
    if min(declared, limit) >= UNLIMITED:
        raise ModelError("The model's files declare no maximum length. Pass max_tokens, for example max_tokens=512.")
    return min(declared, limit)


def _check_truncation(
    root: Path, config: Mapping[str, Any], head: Mapping[str, Any], cut: int | None, width: int
) -> None:
    """Refuse to cut vectors of a model that was not trained for it: the first dimensions alone then mean little."""
    if cut is None:
        return
    if not 1 <= cut <= width:
        raise ModelError(f"truncate_dim={cut} is outside this model's vectors: choose 1 to {width}.")
    readme = root / "README.md"
    said = readme.is_file() and "matryoshka" in readme.read_text("utf-8", errors="replace").lower()
    if not (said or head.get("truncate_dim") or config.get("matryoshka_dimensions") or config.get("is_matryoshka")):
        raise ModelError(
            f"truncate_dim={cut}, but nothing in {root} says that the model was trained for shorter vectors. Leave "
            '"truncate_dim" out, or add "is_matryoshka": true to config.json if you know that it was.'
        )
