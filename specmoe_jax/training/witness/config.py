"""What is trained and how: two frozen configurations."""

import dataclasses

from specmoe_jax.support.errors import UserError


@dataclasses.dataclass(frozen=True)
class WitnessConfig:
    """The sizes of the model; letters as in types.py. Layer 0 is dense, all others are mixtures of experts."""

    vocab_size: int = 5120  # V
    hidden_size: int = 256  # M
    num_layers: int = 8  # L, without the MTP layer
    num_heads: int = 4  # H
    num_kv_heads: int = 2  # K
    head_dim: int = 64  # D
    rotary_share: float = 0.5  # of a head's columns, as GLM-4.5
    rope_theta: float = 10000.0
    num_experts: int = 32  # E
    experts_per_token: int = 4  # A
    expert_hidden: int = 48  # F, also of the shared expert
    dense_hidden: int = 256  # of layer 0
    routed_scale: float = 2.0  # sqrt(A): keeps the variance of A averaged experts at that of one
    max_positions: int = 2048
    norm_eps: float = 1e-5

    @property
    def rotary_dim(self) -> int:
        return int(self.head_dim * self.rotary_share)

    @property
    def num_moe_layers(self) -> int:
        """Layers with experts, the MTP layer's counted."""
        return self.num_layers

    def __post_init__(self):
        if self.num_heads % self.num_kv_heads or self.rotary_dim % 2 or self.experts_per_token > self.num_experts:
            raise ValueError(f"sizes do not fit each other: {self}")


@dataclasses.dataclass(frozen=True)
class RecipeConfig:
    """How it is trained. Lengths in tokens, counts in steps."""

    batch_size: int = 16
    length: int = 512
    optimizer: str = "muon"
    learning_rate: float = 8e-3
    warmup_steps: int = 30
    stable_steps: int = 100_000  # where the constant phase ends; without decay steps, where the run ends
    decay_steps: int = 0
    weight_decay: float = 0.05
    capacity_factor: float = 1.5  # rows of an expert in training, relative to an even load
    bias_rate: float = 5e-3  # step of the router's balancing bias
    mtp_weight: float = 0.3
    mtp_share: float = 0.25  # of a batch's rows on which the MTP layer is trained
    ema_decay: float = 0.998
    repeat_weight: float = 0.0  # of the loss on the model's own repetitions (repetition.py)
    repeat_rows: int = 8  # continuations of a step
    repeat_every: int = 8  # steps whose continuations are drawn at once
    repeat_sampled: float = 0.25  # share of the continuations that are not greedy
    repeat_prompt: int = 32  # tokens of training text before one
    repeat_tokens: int = 128  # of one
    repeat_size: int = 4  # tokens in a row that must not come again
    local_weight: float = 0.0  # of the loss on what neighbouring tokens choose differently
    local_layers: int = 4  # the lowest mixtures, on which it acts
    seed: int = 0

    def __post_init__(self):
        for weight, prefix in (("repeat_weight", "repeat_"), ("local_weight", "local_")):
            if getattr(self, weight):
                continue
            changed = [f.name for f in dataclasses.fields(self) if f.name.startswith(prefix) and getattr(self, f.name) != f.default]
            if changed:
                raise UserError(f"{changed[0]} has no effect while {weight} is 0; give --{weight} too, or leave it out")
