"""Families whose attention chooses the keys that it reads, and so is plain attention while a context has no more than that."""
