"""Read modules.json of a sentence-transformers directory: the modules that Shoal runs, and their configurations."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from ..errors import ModelError
from .files import read_json

# The modules that Shoal runs; Dropout does nothing at inference.
SUPPORTED = ("Transformer", "Pooling", "Dense", "LayerNorm", "Normalize", "Dropout")
Pooling = Literal["cls", "lasttoken", "max", "mean", "mean_sqrt_len_tokens", "weightedmean"]
POOLING_MODES = get_args(Pooling)
# The boolean of each mode in directories from before sentence-transformers 5.7, in the order of concatenation.
OLD_POOLING = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
TRANSFORMERS = ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")  # in names of files
# Loading options that change nothing in the outputs of the network but the precision, which Encoder's `dtype` sets.
IGNORED_OPTIONS = frozenset(
    {"attn_implementation", "device_map", "dtype", "low_cpu_mem_usage", "torch_dtype", "use_cache", "use_safetensors"}
)


@dataclass(frozen=True)
class StModules:
    """The content of modules.json and of the files that it names; the defaults stand for values that they do not set."""

    subfolder: str = ""
    pooling: tuple[str, ...] = ()
    include_prompt: bool = True
    dense: tuple[str, ...] = ()
    width: int = 0  # of the vectors after the last dense layer; 0 without one
    normalize: bool = False
    max_tokens: int | None = None
    lower_case: bool = False
    is_causal: bool | None = None


def read(root: Path) -> StModules:
    """Read the modules of a model directory; all defaults for a checkpoint without modules.json. Raises ModelError."""
    entries = read_json(root / "modules.json", None)
    if entries is None:
        return StModules()
    named = [(_kind(entry["type"], root), entry.get("path", "")) for entry in entries]
    kinds = [kind for kind, _ in named]
    _check_order(kinds, root)
    transformer = named[0][1]
    dense = tuple(path for kind, path in named if kind in ("Dense", "LayerNorm"))
    modes, include_prompt = _pooling(root / dict(named)["Pooling"])
    return StModules(
        subfolder=transformer,
        pooling=modes,
        include_prompt=include_prompt,
        dense=dense,
        width=_width(root, dense),
        normalize="Normalize" in kinds,
        **_transformer(root / transformer),
    )


def read_reranker(root: Path) -> StModules:
    """Read the modules of a CrossEncoder directory or a plain checkpoint. Raises ModelError for any beside the network."""
    entries = read_json(root / "modules.json", None)
    if entries is None:  # CrossEncoder then reads no sentence_bert_config.json
        return StModules()
    kinds = [entry["type"].rsplit(".", 1)[-1] for entry in entries]
    if kinds != ["Transformer"]:
        raise ModelError(
            f"{root}/modules.json runs {' > '.join(kinds)}. Of CrossEncoder directories Shoal runs classifiers; a language "
            "model scores through the --recipe it belongs to."
        )
    subfolder = entries[0].get("path", "")
    return StModules(subfolder=subfolder, **_transformer(root / subfolder, "sequence-classification"))


def pooling_modes(requested: str | Sequence[str]) -> tuple[str, ...]:
    """Return pooling modes as a tuple. Raises ModelError for a mode that does not exist."""
    modes = (requested,) if isinstance(requested, str) else tuple(requested)
    unknown = [mode for mode in modes if mode not in POOLING_MODES]
    if unknown or not modes:
        raise ModelError(f"Pooling {unknown} does not exist. Choose from {', '.join(POOLING_MODES)}.")
    return modes


def _kind(dotted: str, root: Path) -> str:
    """Return the class name of a module. Raises ModelError for a module that Shoal does not run."""
    kind = dotted.rsplit(".", 1)[-1]
    if kind not in SUPPORTED or not dotted.startswith("sentence_transformers."):
        raise ModelError(
            f"{root}/modules.json has a module {dotted!r}, which Shoal does not run. It runs {', '.join(SUPPORTED)}."
        )
    return kind


def _check_order(kinds: list[str], root: Path) -> None:
    """Raise ModelError unless the modules come in the order that Shoal runs."""
    active = [kind for kind in kinds if kind != "Dropout"]
    ordered = active[:2] == ["Transformer", "Pooling"] and "Normalize" not in active[:-1]
    if not ordered or active.count("Transformer") + active.count("Pooling") != 2:
        raise ModelError(
            f"{root}/modules.json runs {' > '.join(kinds)}. Shoal runs Transformer > Pooling, then Dense or LayerNorm "
            "any number of times, then at most one Normalize."
        )


def _pooling(folder: Path) -> tuple[tuple[str, ...], bool]:
    """Read the pooling modes of a Pooling module, and whether a prompt's tokens are pooled."""
    config = read_json(folder / "config.json")
    requested = config.get("pooling_mode")
    if requested is None:
        requested = tuple(mode for key, mode in OLD_POOLING.items() if config.get(key)) or "mean"
    return pooling_modes(requested), config.get("include_prompt", True)


def _width(root: Path, dense: Sequence[str]) -> int:
    """Read the width of the vectors after the last dense layer; 0 without one. Raises ModelError."""
    configs = [read_json(root / folder / "config.json") for folder in dense]
    for folder, config in zip(dense, configs, strict=True):
        names = {config.get(key) or "sentence_embedding" for key in ("module_input_name", "module_output_name")}
        if names != {"sentence_embedding"}:
            raise ModelError(
                f"{root / folder} works on {sorted(names)}. Shoal runs such layers on sentence_embedding only."
            )
    return next((config["out_features"] for config in reversed(configs) if "out_features" in config), 0)


def _transformer(folder: Path, task: str = "feature-extraction") -> dict[str, Any]:
    """Read sentence_bert_config.json of the transformer module. Raises ModelError for an option that changes the vectors."""
    files = [folder / f"sentence_{kind}_config.json" for kind in TRANSFORMERS]
    file = next(filter(Path.is_file, files), files[0])
    config = read_json(file, {})
    configured_task = config.get("transformer_task", task)
    if configured_task != task or "message" in config.get("modality_config", {}):
        raise ModelError(f"{file} sets {configured_task!r} or a chat template. Shoal runs plain texts through {task}.")
    options: dict[str, Any] = {}
    for key in ("model_args", "model_kwargs", "tokenizer_args", "processor_kwargs", "config_args", "config_kwargs"):
        options |= config.get(key) or {}
    unsupported = sorted(options.keys() - IGNORED_OPTIONS - {"model_max_length", "is_causal", "trust_remote_code"})
    if unsupported or config.get("processing_kwargs"):
        raise ModelError(
            f"{file} sets {unsupported or 'processing_kwargs'}, which Shoal does not follow. Write what they change into "
            "config.json or tokenizer_config.json."
        )
    return {
        "max_tokens": options.get("model_max_length") or config.get("max_seq_length"),
        "lower_case": bool(config.get("do_lower_case", False)),
        "is_causal": options.get("is_causal"),
    }
