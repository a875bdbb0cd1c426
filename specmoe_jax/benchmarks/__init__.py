"""Measured comparisons: rounds of several plans side by side, the tables of a suite, their plots."""
