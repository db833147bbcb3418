"""bge-reranker-{base,large} and bge-reranker-v2-m3 (BAAI): encoders with one logit a pair.

Source: the model cards. Scores are raw logits; `--activation sigmoid` maps them to 0..1.
Verified here on a tiny random XLM-RoBERTa classifier only.
"""

from . import RerankRecipe, Stage

RECIPE = RerankRecipe(
    models=("BAAI/bge-reranker-v2-m3", "BAAI/bge-reranker-large", "BAAI/bge-reranker-base"),
    activation="none",
    max_tokens=512,
    training=(Stage(name="finetune", loss="listwise", learning_rate=6e-5, note="cross-entropy over the group"),),
    scores={
        "BAAI/bge-reranker-large": {"T2": 67.60, "MMarco": 37.17, "CMedQAv1": 82.14, "CMedQAv2": 84.19},
        "BAAI/bge-reranker-base": {"T2": 67.28, "MMarco": 35.46, "CMedQAv1": 81.27, "CMedQAv2": 84.10},
    },
)
