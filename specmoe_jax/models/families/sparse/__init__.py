"""Families whose attention chooses the positions that it reads of a long context."""
