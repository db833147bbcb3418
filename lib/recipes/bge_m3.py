"""bge-m3 (BAAI, MIT): XLM-RoBERTa-large, first token, no prompt, up to 8192 tokens.

Sources: the model card and FlagEmbedding's unified finetuning. Verified here on a tiny random checkpoint of the
architecture only.
"""

from . import PASSAGE, QUERY, Recipe, TrainingStage

RECIPE = Recipe(
    models=("BAAI/bge-m3",),
    pooling="cls",
    normalize=True,
    max_tokens=8192,
    prompts={QUERY: "", PASSAGE: ""},
    training=(
        TrainingStage(
            name="bge-m3-unified",
            start="BAAI/bge-m3",
            loss=("m3-unified:temperature=0.02",),
            batch=256,  # ours
            group=2,
            query_tokens=512,
            passage_tokens=8192,
            learning_rate=5e-6,
            warmup=0.1,
            weight_decay=0.01,
            gradient_checkpointing=True,
            precision="float16",
            chosen=("batch",),
            note="FlagEmbedding's example, with self-distillation; negatives do not cross devices",
        ),
    ),
)
