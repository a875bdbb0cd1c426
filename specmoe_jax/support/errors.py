"""The errors a user can cause: one line with the value, the expected one, and what to do."""


class UserError(ValueError):
    """Base of every error that a person can mend; scripts print it as one line `error: ...` and exit 1."""


class CheckpointError(UserError):
    """A checkpoint that is missing, broken or not what its config says. Names file and tensor."""


class PlanError(UserError):
    """A plan that cannot run, or that holds an option without effect. Names the option and a plan that works."""


class MachineError(PlanError):
    """A plan is for another kind of machine."""


class BudgetError(PlanError):
    """A memory budget that a plan does not fit. Names the resource, the shortage and a budget that works."""


class RequestError(UserError):
    """A prompt or its sampling parameters that cannot be served."""


class QueueFull(UserError):
    """More requests wait than may."""


class PinnedMemoryError(UserError):
    """Pinned host memory that the system refused. pinned_bytes: what the experts had got before."""

    def __init__(self, message: str, pinned_bytes: int = 0):
        super().__init__(message)
        self.pinned_bytes = pinned_bytes
