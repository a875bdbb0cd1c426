"""Batches of a token stream in an order that depends on the seed and the step alone."""

import numpy as np


def batch_at(tokens: np.ndarray, step: int, *, batch_size: int, length: int, seed: int) -> np.ndarray:
    """The batch of one step -> [B, length + 1] int32. Resuming at a step needs nothing but its number.

    An epoch cuts the stream into windows at a fresh offset and visits each once.
    """
    windows = (len(tokens) - 1) // length - 1
    per_epoch = windows // batch_size
    if per_epoch < 1:
        raise ValueError(f"{len(tokens)} tokens do not fill one batch of {batch_size} windows of {length}; take less")
    epoch, position = divmod(step, per_epoch)
    rng = np.random.default_rng((seed, epoch))
    offset = rng.integers(length)
    chosen = rng.permutation(windows)[position * batch_size : (position + 1) * batch_size]
    return np.stack([tokens[offset + w * length : offset + (w + 1) * length + 1] for w in chosen]).astype(np.int32)


def held_out_windows(tokens: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Consecutive windows that predict every token but the first once.

    -> inputs and targets [n, length] int32; targets are -1 past the end of the stream.
    """
    count = -(-(len(tokens) - 1) // length)
    padded = np.full(count * length + 1, -1, np.int32)
    padded[: len(tokens)] = tokens
    inputs = padded[:-1].reshape(count, length)
    return np.where(inputs < 0, 0, inputs), padded[1:].reshape(count, length)
