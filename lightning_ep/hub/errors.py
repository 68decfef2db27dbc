"""The one error of checkpoints, those of a run and those in the hub's layout."""


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, is damaged, or does not fit this run or model. The same on every rank."""
