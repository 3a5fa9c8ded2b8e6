"""The folder of the demo checkpoint, and its model card."""
