"""The pure half of each draft: checks, memory, costs, calibration, where the search starts."""
