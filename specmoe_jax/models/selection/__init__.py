"""Attention to the positions that an indexer chooses of a long context (DeepSeek-V3.2: sparse attention)."""
