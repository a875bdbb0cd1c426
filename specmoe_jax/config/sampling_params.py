"""How requests are sampled."""

import dataclasses

from specmoe_jax.support.errors import RequestError
from specmoe_jax.support.validation import is_number, is_text, is_whole, plain, shown


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How one request is sampled and when it ends. Temperature 0 is greedy.

    Raises RequestError for values outside their range.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0  # 0 = whole vocabulary
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self):
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, plain(getattr(self, field.name)))
        if not is_whole(self.max_new_tokens) or not 1 <= self.max_new_tokens < 1 << 31:
            said = "a whole number of at least 1, at most 2147483647"
            raise RequestError(f"max_new_tokens is {shown(self.max_new_tokens)}; it must be {said}")
        if not is_number(self.temperature) or self.temperature < 0:
            raise RequestError(f"temperature is {shown(self.temperature)}; it must be 0 (greedy) or more, and finite")
        if not is_whole(self.top_k) or not 0 <= self.top_k < 1 << 31:
            raise RequestError(f"top_k is {shown(self.top_k)}; it must be a whole number, 0 (whole vocabulary) or more")
        if not is_number(self.top_p) or not 0 < self.top_p <= 1:
            raise RequestError(f"top_p is {shown(self.top_p)}; it must be in (0, 1]")
        if not is_whole(self.seed) or not 0 <= self.seed < 1 << 32:
            raise RequestError(f"seed is {shown(self.seed)}; it must be a whole number from 0 to {(1 << 32) - 1}")
        if not isinstance(self.stop, tuple) or not all(isinstance(s, str) and s and is_text(s) for s in self.stop):
            raise RequestError(f"stop is {self.stop!r}; it must be a tuple of texts of at least one character each")
        if not isinstance(self.ignore_eos, bool):
            raise RequestError(f"ignore_eos is {self.ignore_eos!r}; it must be true or false")
        if self.temperature == 0 and (self.top_k != 0 or self.top_p != 1.0):
            raise RequestError("top_k and top_p have no effect at temperature 0; set a temperature or leave them out")
