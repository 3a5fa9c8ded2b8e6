#!/usr/bin/env bash
# With a device map, diffusers does not report the weights that a checkpoint lacks. It fails while moving the model.
#
# Without a device map, from_pretrained reports missing weights in its loading info and continues. With one, it raises
# a NotImplementedError about meta tensors before it returns the report. To report the missing weights, a program must
# load without a device map and move the model afterwards.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 diffusers==0.42.1 transformers==5.17.0 accelerate==1.15.0 \
  numpy==2.4.6
cd "$folder"
venv/bin/python - <<'PYTHON'
import diffusers
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file

print("diffusers", diffusers.__version__)
AutoencoderKL(block_out_channels=(32,)).save_pretrained("vae")
file = "vae/diffusion_pytorch_model.safetensors"
weights = load_file(file)
del weights["post_quant_conv.bias"]
save_file(weights, file)

_, report = AutoencoderKL.from_pretrained("vae", output_loading_info=True)
print("without a device map, missing:", report["missing_keys"])
assert list(report["missing_keys"]) == ["post_quant_conv.bias"]
try:
    AutoencoderKL.from_pretrained("vae", output_loading_info=True, device_map={"": "cpu"})
except NotImplementedError as error:
    print("with a device map:", error)
    assert "post_quant_conv" not in str(error), "the behaviour has changed"
else:
    raise SystemExit("the behaviour has changed: it loads")
PYTHON
