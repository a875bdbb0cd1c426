"""The memory account as a tuple, and the loads that it counts."""

from typing import NamedTuple

ARRIVING_BYTES = 256 << 20  # 5 ms of a fast link: enough to keep it busy between two looks at what has arrived
PROGRAM_BYTES = (
    160 << 20
)  # of a process beside all that: XLA's programs and their compilation (benchmarks/studies/measure_promises.py)


class MemoryAccount(NamedTuple):
    """Bytes by tier and purpose, and the slots R of the expert pool: on the accelerator those of one device, on the host all.

    merged_slots are further ones, which hold merged experts for good.
    pinned_slots of them hold experts that stay between passes; with wanted_slots every dispatch fits at once, and
    what is beyond holds prefetched experts.
    """

    weight_bytes: int
    expert_bytes: int  # one expert, on average where layers are packed differently
    slot_bytes: int  # the largest expert, which fits into any slot
    num_slots: int
    wanted_slots: int
    pinned_slots: int
    merged_slots: int
    kv_bytes: int
    activation_bytes: int
    host_experts: int  # experts in host memory: all, or as many as the budget lets a disk tier cache
    kv_on_host: bool
    draft_model_bytes: int = 0  # of a draft of its own: all but what the next two lines count
    draft_kv_bytes: int = 0  # its cache on the accelerator
    draft_pages: int = 0  # of that cache, where it is split; 0: whole rows
    host_draft_bytes: int = 0  # the split cache's other part, as many pages as the target's; or a draft's experts in host memory
    kv_pages: int = 0  # of the host's paged cache (expert_flow=stream), else 0
    hidden_bytes: int = 0  # what waits in host memory of prompts: hidden states between two layers; of a stream q, k, v too
    cross_bytes: int = 0  # keys and values of what an encoder read
    staging_bytes: int = 0  # keys and values of the prompts' chunks that attend on the accelerator, of one layer at a time
    pinned_layers: int = 0  # of the spare-expert cache (expert_flow=stream): its experts are the pinned_slots
    state_bytes: int = 0  # of recurrent layers, on the accelerator wherever the KV cache is
    moving_experts: int = 0  # beside the slots, on an accelerator of its own: on their way, and the copy of the one it multiplies

    @property
    def dispatch_slots(self) -> int:
        """Those that a layer's dispatch can count on."""
        return min(self.num_slots, self.wanted_slots) - self.pinned_slots

    @property
    def host_expert_bytes(self) -> int:
        return self.host_experts * self.expert_bytes

    @property
    def spare_expert_bytes(self) -> int:
        """The spare-expert cache: experts beside the stream, which cross the link once."""
        return self.pinned_slots * self.slot_bytes if self.pinned_layers else 0

    @property
    def accelerator_kv_bytes(self) -> int:
        return 0 if self.kv_on_host else self.kv_bytes

    @property
    def host_kv_bytes(self) -> int:
        return self.kv_bytes if self.kv_on_host else 0

    @property
    def accelerator_bytes(self) -> int:
        experts = (self.num_slots + self.merged_slots + self.moving_experts) * self.slot_bytes
        beside = self.draft_model_bytes + self.draft_kv_bytes + self.cross_bytes + self.staging_bytes + self.state_bytes
        return self.weight_bytes + experts + self.accelerator_kv_bytes + self.activation_bytes + beside

    @property
    def host_bytes(self) -> int:
        return self.host_expert_bytes + self.host_kv_bytes + self.hidden_bytes + self.host_draft_bytes


class PagedLoad(NamedTuple):
    """What a batch of a streamed plan can fill at once. pages: of the KV cache; prompt_tokens: hidden states of a prefill."""

    pages: int
    prompt_tokens: int


class DraftMemory(NamedTuple):
    """Bytes of a draft of its own: whatever the batch, of each row of it, and of each position of a row in its cache.

    watched: of each position of a prompt, the inputs of the target's layers that it takes. host: of the host's memory, whatever
    the batch.
    """

    fixed: int = 0
    row: int = 0
    position: int = 0
    watched: int = 0
    host: int = 0


def arriving_experts(expert_bytes: int, num_experts: int) -> int:
    """Experts that may be on their way to an accelerator of its own at a time, beside its slots: at most those of a layer."""
    return min(max(2, ARRIVING_BYTES // expert_bytes), num_experts)
