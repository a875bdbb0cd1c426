"""Families whose layers differ in how they attend: a state of fixed size in the place of a cache, or windows and other KV heads."""
