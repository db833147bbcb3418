"""bge-reranker-v2-gemma (BAAI): a causal language model; score = the logit of Yes after the prompt.

Source: FlagEmbedding's description of its LLM rerankers. The score is raw; `--activation sigmoid` maps it to 0..1. Queries
take three quarters of the length at most, only passages are cut. Verified here on a tiny random Gemma only.
"""

from . import RerankRecipe, Stage

QUESTION = (
    "Given a query A and a passage B, determine whether the passage contains an answer to the query by providing a "
    "prediction of either 'Yes' or 'No'."
)

RECIPE = RerankRecipe(
    models=("BAAI/bge-reranker-v2-gemma",),
    segments=("<bos>", "A: {query}", "\n", "B: {passage}", "\n", QUESTION),
    answers=("Yes",),
    beyond=("\n", QUESTION) * 2,  # FlagEmbedding makes room for both twice
    activation="none",
    max_tokens=1024,
    training=(
        Stage(
            name="finetune",
            loss="listwise",
            learning_rate=2e-4,
            epochs=1,
            group=16,
            query_tokens=512,
            passage_tokens=512,
            precision="bfloat16",
            note="LoRA r 32, alpha 64 on q, k, v, o; distillation; ZeRO-1, warm-up 0.1; batch 1, accumulation 16",
        ),
    ),
)
