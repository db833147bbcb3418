"""bge-m3 (BAAI, MIT): XLM-RoBERTa-large, first token, no prompt, up to 8192 tokens.

Sources: the model card and FlagEmbedding's unified finetuning. Verified here on a tiny random checkpoint of the
architecture only.
"""

from . import PASSAGE, QUERY, Recipe, Stage

RECIPE = Recipe(
    models=("BAAI/bge-m3",),
    pooling="cls",
    normalize=True,
    max_tokens=8192,
    prompts={QUERY: "", PASSAGE: ""},
    dtype="float16",
    training=(
        Stage(
            name="unified finetune",
            loss="m3_unified",
            temperature=0.02,
            learning_rate=5e-6,
            group=2,
            gathered=False,
            query_tokens=512,
            passage_tokens=8192,
            precision="float16",
            note="FlagEmbedding's example: warm-up 0.1, weight decay 0.01, self-distillation on",
        ),
    ),
)
