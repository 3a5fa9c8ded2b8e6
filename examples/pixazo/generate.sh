#!/usr/bin/env bash
# Submits a request by Pixazo's API, polls it, and saves the image as star.jpeg.
# Needs curl and jq.
set -euo pipefail
SERVER=${SERVER:-http://127.0.0.1:8000} KEY=${KEY:-none}
curl=(curl -sS --fail-with-body -H "Ocp-Apim-Subscription-Key: $KEY")

request=$("${curl[@]}" "$SERVER/glm-image/v1/glm-image-request" -H 'Content-Type: application/json' \
  -d '{"prompt": "a small red star above a blue circle on a yellow background", "image_size": "square",
       "num_inference_steps": 8, "seed": 7}') || { echo "$request" >&2; exit 1; }

while [[ $(jq -r .status <<<"$request") =~ ^(QUEUED|PROCESSING)$ ]]; do
  sleep 1
  request=$("${curl[@]}" --retry 9 --retry-connrefused "$(jq -r .polling_url <<<"$request")")
done
[[ $(jq -r .status <<<"$request") == COMPLETED ]] || { jq .error <<<"$request" >&2; exit 1; }
curl -sS --fail -o star.jpeg "$(jq -r '.output.media_url[0]' <<<"$request")"
echo "star.jpeg, seed $(jq .seed <<<"$request")"
