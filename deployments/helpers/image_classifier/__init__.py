"""The classifier of the safety checker, which knows no Ray: how unsafe an image is."""
