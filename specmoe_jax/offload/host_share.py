"""Which of a layer's absent experts the host's cores compute where they lie, while the link brings the others. Pure."""

import numpy as np

# From about so many tokens on a core computes an expert for longer than reading it takes (16 to 64 by machine), while a copy takes
# as long for one token as for all.
MOST_CHOICES = 32


def computed_on_host(absent: np.ndarray, choices: np.ndarray, share: float) -> np.ndarray:
    """[E] bool, of the absent experts those that stay where they are.

    absent: [E] bool. choices: [E] int, tokens that chose each. share: of the absent ones, rounded to whole experts, at most; those
    that fewest tokens chose, since they cost the cores least and are the least likely to be wanted again. No clock decides, so
    every run (and every process) decides alike.
    """
    count = int(share * int(absent.sum()) + 0.5)  # Python's round takes halves to the even number
    candidates = np.flatnonzero(absent & (choices <= MOST_CHOICES))
    chosen = np.zeros_like(absent)
    chosen[candidates[np.argsort(choices[candidates], kind="stable")][:count]] = True
    return chosen
