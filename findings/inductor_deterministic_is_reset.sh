#!/usr/bin/env bash
# TORCHINDUCTOR_DETERMINISTIC=1 makes the compiler deterministic for the first compiled function only.
#
# The variable sets torch._inductor.config.deterministic when torch is imported. The first compiled frame resets
# it, because Dynamo restores torch.use_deterministic_algorithms, which writes the same setting. Kernels that are
# compiled later are chosen by timing again. What lasts is torch.compile(..., options={"deterministic": True}).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cd "$folder"
TORCHINDUCTOR_DETERMINISTIC=1 venv/bin/python - <<'PYTHON'
import torch
import torch._inductor.config as inductor

print("torch", torch.__version__)
before = inductor.deterministic
torch.compile(lambda x: x + 1, backend="eager")(torch.ones(2))
after = inductor.deterministic
print(f"deterministic before the first compiled function: {before}; after it: {after}")
assert (before, after) == (True, False), "the behaviour has changed"
PYTHON
