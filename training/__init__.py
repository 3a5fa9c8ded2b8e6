"""Training of the checkpoints in this repository. It is part of no wheel and no container."""
