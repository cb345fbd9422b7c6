"""Language models that read embeddings: one module per kind, found by its name."""
