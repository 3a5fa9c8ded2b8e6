"""The chat model of the prompt expander, which knows no Ray: prompts, rewritten."""
