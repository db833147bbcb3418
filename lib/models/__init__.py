"""Models: a model directory -> tokenizer, packed encoder, reranker. Floor 3: imports no engine and no job."""
