"""The API plane: HTTP in, calls to the model plane, images out. Loads no torch."""

__version__ = "0.2.0"
