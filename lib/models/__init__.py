"""A model directory -> tokenizer, packed encoder, reranker. Floor 3: knows no engine and no job."""
