"""Which experts stay resident and draft: usage, policies, affinity, substitution."""
