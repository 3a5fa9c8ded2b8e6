"""What can go wrong in the model plane, in its own words. Status codes are the API plane's business."""


class ModelError(Exception):
    """Base of the errors that the model plane raises on purpose."""


class CheckpointError(ModelError):
    """A checkpoint, or a named component of it, is missing or does not fit."""


class Cancelled(ModelError):  # noqa: N818 - a request that was called off is not a fault
    """The caller has gone; the work was stopped."""
