"""An index's vectors for other databases: Milvus, Pinecone, Lance. In `index`, above `build`."""
