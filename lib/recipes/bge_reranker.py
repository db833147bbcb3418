"""bge-reranker-{base,large} and bge-reranker-v2-m3 (BAAI): encoders with one logit a pair.

Source: the model cards. Scores are raw logits; `--activation sigmoid` maps them to 0..1.
Verified here on a tiny random XLM-RoBERTa classifier only.
"""

from . import RerankRecipe, TrainingStage, c_mteb

RECIPE = RerankRecipe(
    models=("BAAI/bge-reranker-v2-m3", "BAAI/bge-reranker-large", "BAAI/bge-reranker-base"),
    activation="none",
    max_tokens=512,
    training=(
        TrainingStage(
            name="bge-reranker",
            start="BAAI/bge-reranker-base",
            loss=("listwise",),
            batch=64,  # ours
            group=8,  # ours
            passage_tokens=512,
            learning_rate=6e-5,
            chosen=("batch", "group"),
            note="cross-entropy over the group",
        ),
    ),
    scores={
        "BAAI/bge-reranker-large": c_mteb(reranking=(67.60, 37.17, 82.14, 84.19)),
        "BAAI/bge-reranker-base": c_mteb(reranking=(67.28, 35.46, 81.27, 84.10)),
    },
)
