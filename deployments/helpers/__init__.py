"""The helper models: the prompt expander's chat model and the safety checker's classifier."""
