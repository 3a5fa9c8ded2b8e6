#!/usr/bin/env bash
# A GLM-Image model built from transformers' default configuration cannot run a forward pass.
#
# GlmImageConfig() has the released model's sizes, but its rope_parameters name neither mrope_section nor
# partial_rotary_factor. The model then splits the 64 frequencies of a head into 8, 12 and 12, and fails. Released
# checkpoints contain both, so only models built from the defaults are affected: benchmarks and tests.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.17.0 numpy==2.4.6
cd "$folder"
venv/bin/python - <<'PYTHON'
import torch
import transformers
from transformers import GlmImageConfig
from transformers.models.glm_image.modeling_glm_image import GlmImageTextModel

SECTIONS = {
    "rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5, "mrope_section": [8, 12, 12]
}


def forward(**fields):
    config = GlmImageConfig(text_config={"num_hidden_layers": 1} | fields).text_config
    with torch.device("meta"):
        model = GlmImageTextModel(config)
        ids, positions = torch.zeros(1, 2, dtype=torch.long), torch.zeros(3, 1, 2, dtype=torch.long)
        model(input_ids=ids, position_ids=positions, use_cache=False)


print("transformers", transformers.__version__)
try:
    forward()
except RuntimeError as error:
    print("with the defaults:", error)
    assert "split_sizes" in str(error), "the behaviour has changed"
else:
    raise SystemExit("the behaviour has changed: the defaults run")
forward(rope_parameters=SECTIONS)
print("with the sections given: it runs")
PYTHON
