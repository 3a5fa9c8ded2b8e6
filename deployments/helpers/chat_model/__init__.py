"""The chat model of the prompt expander, which rewrites prompts. It does not use Ray."""
