"""Codes of 4 bits and what they stand for, of experts and of dense matrices alike."""

import numpy as np

INT4_OFFSET = 8  # of the codes as they are stored


def decoded_int4(codes, scales, xp):
    """[..., bytes] uint8, two codes each with the even one low, and scales [..., groups] -> [..., columns of whole groups] float32.

    xp: numpy or jax.numpy.
    """
    nibbles = xp.stack([codes & 15, codes >> 4], axis=-1).reshape(*scales.shape, -1)
    groups = (nibbles.astype(np.float32) - INT4_OFFSET) * scales[..., None].astype(np.float32)
    return groups.reshape(*scales.shape[:-1], -1)
