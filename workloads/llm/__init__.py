"""The transformer core that the LLM systems share: one packed-row model, its shards, its paged KV cache."""
