"""bge-reranker-v2-minicpm-layerwise (BAAI, Apache-2.0): MiniCPM-2B with a scalar head after each of its later layers.

Source: FlagEmbedding's layerwise reranker. `jobs/convert_reranker.py --layer N` writes the first N layers and their head as
transformers' LLaMA classifier: MiniCPM's three scales are folded into its matrices. Verified here on a tiny checkpoint of the
same shape with code written for the test.
"""

from . import RerankRecipe
from .bge_reranker_gemma import QUESTION

RECIPE = RerankRecipe(
    models=("BAAI/bge-reranker-v2-minicpm-layerwise",),
    segments=("<s>", "A: {query}", "\n", "B: {passage}", "\n", QUESTION),
    beyond=("\n", QUESTION) * 2,
    activation="none",
    max_tokens=1024,
)
