"""The demo checkpoint and its model card."""
