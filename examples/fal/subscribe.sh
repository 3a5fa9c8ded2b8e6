#!/usr/bin/env bash
# Submits a request to fal's queue, prints its log, and saves the image as star.jpeg.
# Needs curl and jq.
set -euo pipefail
SERVER=${SERVER:-http://127.0.0.1:8000} KEY=${KEY:-none}
curl=(curl -sSN --fail-with-body -H "Authorization: Key $KEY")

request=$("${curl[@]}" "$SERVER/queue/fal-ai/glm-image" -H 'Content-Type: application/json' \
  -d '{"prompt": "a small red star above a blue circle on a yellow background", "image_size": "square",
       "num_inference_steps": 10, "seed": 7}') || { echo "$request" >&2; exit 1; }

# The stream ends with the request. Each line of the log comes once.
"${curl[@]}" "$(jq -r .status_url <<<"$request")/stream?logs=1" |
  jq --unbuffered -rR 'select(startswith("data: ")) | .[6:] | fromjson | .logs // [] | .[].message'

# The status of a failed request is COMPLETED too. Its result is the error.
result=$("${curl[@]}" "$(jq -r .response_url <<<"$request")") || { echo "$result" >&2; exit 1; }
curl -sS --fail -o star.jpeg "$(jq -r '.images[0].url' <<<"$result")"
echo "star.jpeg, seed $(jq .seed <<<"$result")"
