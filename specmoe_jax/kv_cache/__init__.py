"""The KV cache: page table and layout of positions."""
