"""The one error of checkpoints."""


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, is damaged, or does not fit this run or model. The same on every rank."""
