"""`share`: blocks that use the same tensors, codebooks, tied and thin embeddings, ALBERT."""
