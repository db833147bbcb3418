"""One optimizer step, with the gradients of one large batch at any number of ranks.

Contrastive losses need the embeddings of the whole global batch, whose activations do not fit in memory. GradCache (Gao et al.
2021, arXiv 2101.06983) computes them in two passes over small chunks:

1. Forward pass without gradients, chunk by chunk. Only the embeddings are kept. Ranks gather each other's embeddings.
2. The loss of all embeddings, and its gradient with respect to each embedding.
3. Forward pass with gradients, chunk by chunk, with the same dropout. Each chunk's backward pass starts from the gradients of
   its embeddings and accumulates into the weights.

Losses inside single rows (rerankers, pretraining) need no second pass: gradient accumulation over chunks is exact for them.

`grad_cache` holds both steps, `chunks` splits a rank's texts by a token budget, `collectives` gathers over ranks, `parallel`
wraps the network (DDP, FSDP2), `optimizer` is AdamW and its schedule, `trainable` is the interface of what can be trained.
"""
