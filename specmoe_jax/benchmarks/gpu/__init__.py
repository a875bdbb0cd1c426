"""What a machine with one GPU is asked once (specmoe measure_gpu): each module gives rows, one dict a measurement."""
