"""Training of context-agnostic embeddings."""
