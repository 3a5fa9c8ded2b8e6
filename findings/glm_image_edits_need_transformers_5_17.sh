#!/usr/bin/env bash
# diffusers 0.42 edits with GLM-Image only up to transformers 5.17. From 5.18 on, every edit fails.
#
# The pipeline concatenates the features of the source images and turns the result into tokens. Until 5.17 the features
# of an image are rows, so this works. Since 5.18 they are a map of channels, rows and columns for each image, and the
# model wants these maps as they are. Text-to-image works with all versions, so an upgrade seems to succeed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 diffusers==0.42.1 transformers==5.17.0 numpy==2.4.6
for version in 5.18.0 5.24.0; do
  "$folder/venv/bin/pip" install --quiet --no-deps --target "$folder/$version" "transformers==$version"
done
cd "$folder"
cat > edit.py <<'PYTHON'
import torch
import transformers
from diffusers import GlmImagePipeline
from transformers import GlmImageConfig, GlmImageForConditionalGeneration

width, codes, side = 32, 64, 4
model = GlmImageForConditionalGeneration(
    GlmImageConfig(
        text_config={
            "vocab_size": 128, "pad_token_id": 0, "vision_vocab_size": codes + 8, "hidden_size": 64, "intermediate_size": 64,
            "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 1,
            "eos_token_id": 1, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 2, 4]},
        },
        vision_config={"depth": 1, "hidden_size": width, "intermediate_size": width, "num_heads": 2, "patch_size": 16},
        vq_config={"num_embeddings": codes, "embed_dim": width, "latent_channels": width},
    )
).eval()


class Processor:
    """Stands for the tokenizer: one source image, one image to draw."""

    def apply_chat_template(self, *_, **__):
        grids = torch.tensor([[1, side, side], [1, side, side]])
        return transformers.BatchFeature(
            {
                "input_ids": torch.zeros(1, 8, dtype=torch.long),
                "image_grid_thw": grids,
                "images_per_sample": torch.tensor([2]),
                "pixel_values": torch.rand(side * side, 3 * 16 * 16),
            }
        )


def generate(**arguments):
    raise StopIteration  # the source image has been read


model.generate = generate
pipeline = GlmImagePipeline(None, Processor(), None, model, None, None, None)
print("transformers", transformers.__version__, end=": ")
try:
    pipeline.generate_prior_tokens("a boat", 64, 64, image=[[None]])
except StopIteration:
    print("the source image becomes tokens")
except RuntimeError as error:
    print("the edit fails:", error)
    raise SystemExit(3)
PYTHON
venv/bin/python edit.py
for version in 5.18.0 5.24.0; do
  status=0
  PYTHONPATH="$folder/$version" venv/bin/python edit.py || status=$?
  [ "$status" = 3 ] || { echo "the behaviour has changed"; exit 1; }
done
