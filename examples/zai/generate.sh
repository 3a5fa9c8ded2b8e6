#!/usr/bin/env bash
# Generates an image by Z.ai's API and saves it as star.png.
# Needs curl and jq.
set -euo pipefail
SERVER=${SERVER:-http://127.0.0.1:8000} KEY=${KEY:-none}

# num_inference_steps and seed are this server's own. Without a size the image has 1280x1280.
answer=$(curl -sS --fail-with-body "$SERVER/api/paas/v4/images/generations" \
  -H "Authorization: Bearer $KEY" -H 'Content-Type: application/json' \
  -d '{"model": "glm-image", "prompt": "a small red star above a blue circle on a yellow background",
       "size": "512x512", "seed": 7}') || { echo "$answer" >&2; exit 1; }
curl -sS --fail -o star.png "$(jq -r '.data[0].url' <<<"$answer")"
echo star.png
