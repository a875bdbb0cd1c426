"""The same weights in this engine and in llama.cpp."""
