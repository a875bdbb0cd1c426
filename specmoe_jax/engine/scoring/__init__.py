"""Log-probabilities of given texts: what is read, in which passes, and what the head says of it."""
