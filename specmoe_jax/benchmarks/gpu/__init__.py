"""What a machine with one GPU is asked once (scripts/measure_gpu.py): each module gives rows, one dict a measurement."""
