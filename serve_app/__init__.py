"""The API plane: HTTP in, calls to the model plane, images out. Loads no torch."""
