"""Commands that train: the corpus and the weights of the bundled model, EAGLE heads."""
