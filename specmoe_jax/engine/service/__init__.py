"""Continuous batching as a face of the library: requests are submitted one by one, join a running batch and leave it."""
