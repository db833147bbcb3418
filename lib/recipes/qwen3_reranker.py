"""Qwen3-Reranker (Qwen, Apache-2.0): a causal language model that answers yes or no; score = softmax(no, yes), of yes.

Sources: mteb's wrapper and the model card. softmax([no, yes])[yes] is the sigmoid of the difference of the two logits, so
one folded row of the output matrix is enough. Verified here on a tiny random Qwen3 only.
"""

from . import RerankRecipe

SYSTEM = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct provided. "
    'Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
)
ANSWER = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"

RECIPE = RerankRecipe(
    models=("Qwen/Qwen3-Reranker-0.6B", "Qwen/Qwen3-Reranker-4B", "Qwen/Qwen3-Reranker-8B"),
    segments=(SYSTEM, "<Instruct>: {instruction}\n<Query>: {query}\n<Document>: {passage}", ANSWER),
    instruction="Given the user query, retrieval the relevant passages",
    answers=("yes", "no"),
    activation="sigmoid",
    max_tokens=8192,
)
