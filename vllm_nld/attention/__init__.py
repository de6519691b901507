"""How an attention layer reads the KV cache in a draft pass."""
