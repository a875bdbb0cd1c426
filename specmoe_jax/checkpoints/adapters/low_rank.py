"""What an adapter adds to a matrix: the product of two small ones."""

from typing import NamedTuple

import numpy as np


class LowRank(NamedTuple):
    """scale * b @ a, of [out, in]; transposed where the matrix is kept as [in, out]. a: [rank, in], b: [out, rank], float32."""

    a: np.ndarray
    b: np.ndarray
    scale: float
    transposed: bool = False

    def add_to(self, values: np.ndarray) -> None:
        """values: a float32 array or view with as many numbers, in order."""
        delta = (self.b @ self.a) * np.float32(self.scale)
        values += (delta.T if self.transposed else delta).reshape(values.shape)
