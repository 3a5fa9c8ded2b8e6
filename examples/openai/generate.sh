#!/usr/bin/env bash
# Generates an image and saves it as star.png.
# Needs curl and jq.
set -euo pipefail
SERVER=${SERVER:-http://127.0.0.1:8000} KEY=${KEY:-none}

# If the server refuses the request, its answer says why.
answer=$(curl -sS --fail-with-body "$SERVER/v1/images/generations" \
  -H "Authorization: Bearer $KEY" -H 'Content-Type: application/json' \
  -d '{"prompt": "a small red star above a blue circle on a yellow background", "size": "512x512", "seed": 7}') ||
  { echo "$answer" >&2; exit 1; }

# The URL needs no key. With "response_format": "b64_json" the answer contains the file itself.
curl -sS --fail -o star.png "$(jq -r '.data[0].url' <<<"$answer")"
echo "star.png, seed $(jq '.data[0].seed' <<<"$answer")"
