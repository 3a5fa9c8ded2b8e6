"""The API of fal."""
