"""What the ideas beyond both papers are worth, counted: no clock is read."""
