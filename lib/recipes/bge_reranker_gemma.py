"""bge-reranker-v2-gemma (BAAI): a causal language model; score = the logit of Yes after the prompt.

Source: FlagEmbedding's description of its LLM rerankers. The score is raw; `--activation sigmoid` maps it to 0..1. Queries
take three quarters of the length at most, only passages are cut. Verified here on a tiny random Gemma only.
"""

from . import RerankRecipe, TrainingStage

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
        TrainingStage(
            name="bge-reranker-gemma",
            loss=("listwise",),
            batch=16,
            group=16,
            passage_tokens=1024,
            learning_rate=2e-4,
            warmup=0.1,
            lora_rank=32,
            lora_alpha=64,
            lora_targets="q_proj,k_proj,v_proj,o_proj",
            gradient_checkpointing=True,
            precision="bfloat16",
            note="512 tokens of query and 512 of passage; distillation: add listwise-kl; ZeRO-1; batch 1, accumulation 16",
        ),
    ),
)
