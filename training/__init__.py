"""Training of the checkpoints that this repository contains. In no wheel and no container."""
