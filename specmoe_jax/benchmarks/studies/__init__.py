"""Measurements and soaks that a person runs by hand, minutes to an hour each: python -m specmoe_jax.benchmarks.studies.NAME."""
