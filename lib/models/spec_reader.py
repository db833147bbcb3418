"""Read a model's files into a ModelSpec. Imports neither torch nor transformers, so the driver does it in seconds."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import ModelError
from ..recipes import Recipe
from . import files, modules_json
from .modules_json import StModules
from .spec import ModelSpec
from .weight_shapes import check_vocabulary, has_position_table, weight_shapes

# Families whose position tables begin after the padding row: pad_token_id + 1 of their positions are never used.
OFFSET_POSITIONS = {
    *("camembert", "data2vec-text", "esm", "ibert", "lilt", "longformer", "luke", "markuplm", "mluke", "mpnet"),
    *("roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod"),
}
POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len")  # keys of the number of positions
STATES = ("embedding_dim", "word_embed_proj_dim")  # keys of the width after a last projection: EmbeddingGemma2, OPT
WIDTHS = ("hidden_size", "d_model", "dim", "n_embd")  # keys of the hidden size in different configurations
UNLIMITED = 10**20  # tokens; transformers writes 1e30 where a tokenizer has no limit
NOTHING_FIXED = Recipe()


class _ModelFiles(NamedTuple):
    """The JSON files of a model. text: the configuration of the text network, inside `config` or `config` itself."""

    root: Path
    folder: Path
    modules: StModules
    config: Mapping[str, Any]
    text: Mapping[str, Any]
    tokenizer: Mapping[str, Any]
    sentence_transformers: Mapping[str, Any]


def read_spec(
    model: str, fixed: Recipe = NOTHING_FIXED, *, truncate_dim: int | None = None, modules: StModules | None = None
) -> ModelSpec:
    """Read a sentence-transformers directory, a plain transformers checkpoint, or a hub id.

    The model's files are read as sentence-transformers 6.2 reads them. A checkpoint without modules.json is pooled by mean
    (a causal language model by its last token) and not normalised. Chat templates are never applied. fixed: its values, where
    not None, replace those of the files. modules: the content of modules.json, where the caller has read it. Raises ModelError
    when files are missing, or do not allow a requested value.
    """
    root = files.locate(model)
    modules = modules or modules_json.read(root)
    folder = root / modules.subfolder
    weights = files.check(folder)
    config = files.read_json(folder / "config.json")
    source = _ModelFiles(
        root,
        folder,
        modules,
        config,
        text=config.get("text_config") or config,
        tokenizer=files.read_json(folder / "tokenizer_config.json", {}),
        sentence_transformers=files.read_json(root / "config_sentence_transformers.json", {}),
    )
    bidirectional = _bidirectional(source, fixed.bidirectional)
    pooling = _pooling(source, fixed.pooling, bidirectional)
    sizes = _sizes(source)
    pooled = sizes["state_size"] * len(pooling)
    _check_first_layer(source, pooled)
    width = modules.width or pooled
    check_vocabulary(folder, source.tokenizer, sizes["vocabulary"])
    normalize = modules.normalize if fixed.normalize is None else fixed.normalize
    if (
        truncate_dim is not None
    ):  # requested; sentence-transformers does not normalise after a directory's own truncate_dim
        normalize = True
    truncate_dim = _truncate_dim(source, truncate_dim, width)
    return ModelSpec(
        name=model,
        path=str(root),
        revision=files.revision(root, source.folder, weights, modules.dense),
        subfolder=modules.subfolder,
        architecture=(source.config.get("architectures") or [source.config.get("model_type", "unknown")])[0],
        model_type=source.config.get("model_type", "unknown"),
        dim=truncate_dim or width,
        max_tokens=_max_tokens(source, fixed.max_tokens, has_position_table(weight_shapes(weights))),
        pooling=pooling,
        include_prompt=modules.include_prompt,
        dense=modules.dense,
        normalize=normalize,
        truncate_dim=truncate_dim,
        prompts={name: prompt or "" for name, prompt in source.sentence_transformers.get("prompts", {}).items()},
        default_prompt_name=source.sentence_transformers.get("default_prompt_name"),
        bidirectional=bidirectional,
        append_eos=bool(source.tokenizer.get("add_eos_token")) if fixed.append_eos is None else fixed.append_eos,
        lower_case=modules.lower_case,
        padding_side=source.tokenizer.get("padding_side", "right"),
        weight_bytes=sum(file.stat().st_size for file in weights),
        **sizes,
    )


def _sizes(source: _ModelFiles) -> dict[str, Any]:
    """Read the shape of the network, whose keys differ between configurations. Raises ModelError without a width."""

    def first(*names: str) -> int:
        return next((source.text[name] for name in names if source.text.get(name) is not None), 0)

    hidden, heads = first(*WIDTHS), first("num_attention_heads", "num_heads", "n_heads", "n_head") or 1
    if not hidden:
        raise ModelError(
            f"{source.folder}/config.json names no width under any of {', '.join(WIDTHS)}. Shoal cannot size it."
        )
    return {
        "hidden_size": hidden,
        "state_size": first(*STATES) or hidden,
        "vocabulary": first("vocab_size"),
        "layers": first("num_hidden_layers", "num_layers", "n_layers", "n_layer"),
        "heads": heads,
        "kv_heads": first("num_key_value_heads") or heads,
        "head_dim": first("head_dim", "d_kv") or hidden // heads,
        "intermediate_size": first("intermediate_size", "d_ff", "hidden_dim", "n_inner", "d_inner") or 4 * hidden,
        "gated": source.text.get("hidden_act") == "silu"
        or source.text.get("model_type") in ("modernbert", "gemma3_text"),
    }


def _pooling(source: _ModelFiles, requested: str | None, bidirectional: bool) -> tuple[str, ...]:
    """Return the requested pooling, else that of the files, else sentence-transformers' default for the architecture."""
    if requested is not None:
        return modules_json.pooling_modes(requested)
    if source.modules.pooling:
        return source.modules.pooling
    causal = (source.config.get("architectures") or [""])[0].endswith("ForCausalLM") and not bidirectional
    return ("lasttoken",) if causal else ("mean",)


def _bidirectional(source: _ModelFiles, requested: bool | None) -> bool:
    """Return whether a decoder runs without its causal mask: as requested, else as the files declare. Raises ModelError.

    A model with code of its own needs the override. transformers' own class of that type would load in its place silently,
    and be causal where the model's code is not.
    """
    if requested is not None:
        return requested
    own_code = (source.config.get("auto_map") or {}).get("AutoModel")
    if own_code:
        raise ModelError(
            f"{source.folder}/config.json names its own model code ({own_code}), which Shoal does not run. If transformers' "
            f"{source.config.get('model_type')!r} is the same network, say so with bidirectional=True (no causal mask, as "
            "gte-Qwen2) or bidirectional=False (the mask that transformers gives it)."
        )
    declared = (source.modules.is_causal, source.config.get("is_causal"), source.text.get("is_causal"))
    return next((is_causal is False for is_causal in declared if is_causal is not None), False)


def _max_tokens(source: _ModelFiles, requested: int | None, has_table: bool) -> int:
    """Return the most tokens of a text: as requested, else as the files declare, within the model's positions.

    Without a table of positions a model takes more than its config.json says, where sentence_bert_config.json says so. Raises
    ModelError for a request beyond the positions, or files without a limit.
    """
    limit = next((source.text[name] for name in POSITIONS if source.text.get(name) is not None), UNLIMITED)
    limit = UNLIMITED if limit < 1 else limit
    if source.config.get("model_type") in OFFSET_POSITIONS:
        limit -= (source.config.get("pad_token_id") or 0) + 1
    declared = source.modules.max_tokens
    most = limit if has_table else max(limit, declared or 0)
    if requested is not None:
        if not 1 <= requested <= most:
            raise ModelError(
                f"max_tokens={requested} is outside the model's range: 1 to {most}. Choose a number in that range."
            )
        return requested
    if declared:
        return min(declared, most)
    declared = min(int(source.tokenizer.get("model_max_length") or UNLIMITED), limit)
    if declared >= UNLIMITED:
        raise ModelError("The model's files declare no maximum length. Pass max_tokens, for example max_tokens=512.")
    return declared


def _check_first_layer(source: _ModelFiles, pooled: int) -> None:
    """Raise ModelError where the first dense layer takes another width than the pooling gives."""
    for folder in source.modules.dense[:1]:
        config = files.read_json(source.root / folder / "config.json")
        taken = config.get("in_features") or config.get("dimension")
        if taken != pooled:
            raise ModelError(
                f"{source.root / folder} takes vectors of {taken} numbers, and the pooling gives {pooled}. The files are "
                "not of one model: fetch it again."
            )


def _truncate_dim(source: _ModelFiles, requested: int | None, width: int) -> int | None:
    """Return the dimensions to keep, or None for all. Raises ModelError for a model that was not trained for it.

    The first dimensions of such a model's vectors alone mean little.
    """
    head = source.sentence_transformers
    dim = requested if requested is not None else head.get("truncate_dim")
    if dim is None:
        return None
    if not 1 <= dim <= width:
        raise ModelError(f"truncate_dim={dim} is outside this model's vectors: choose 1 to {width}.")
    readme = source.root / "README.md"
    in_readme = readme.is_file() and "matryoshka" in readme.read_text("utf-8", errors="replace").lower()
    in_config = source.config.get("matryoshka_dimensions") or source.config.get("is_matryoshka")
    if not (in_readme or head.get("truncate_dim") or in_config):
        raise ModelError(
            f"truncate_dim={dim}, but nothing in {source.root} says that the model was trained for shorter vectors. Leave "
            '"truncate_dim" out, or add "is_matryoshka": true to config.json if you know that it was.'
        )
    return dim
