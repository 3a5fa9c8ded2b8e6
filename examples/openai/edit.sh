#!/usr/bin/env bash
# Edits with two source images: generates star.png and circle.png, and makes edited.png of both.
# Needs curl and jq. (The demo was trained on one source image. It edits the first.)
set -euo pipefail
SERVER=${SERVER:-http://127.0.0.1:8000} KEY=${KEY:-none}

save() { # save FILE PATH CURL_OPTION...: sends a request and saves its image
  local answer
  answer=$(curl -sS --fail-with-body "$SERVER/v1/images/$2" -H "Authorization: Bearer $KEY" "${@:3}") ||
    { echo "$answer" >&2; exit 1; }
  jq -r '.data[0].b64_json' <<<"$answer" | base64 -d >"$1"
  echo "$1"
}

generate() { # generate FILE PROMPT
  save "$1" generations -H 'Content-Type: application/json' \
    -d '{"prompt": "'"$2"'", "size": "512x512", "response_format": "b64_json", "seed": 1}'
}

generate star.png 'a red star on a white background'
generate circle.png 'a green circle on a white background'
# A form with one to four files. Their order is the order in which the model reads them.
save edited.png edits -F 'image[]=@star.png' -F 'image[]=@circle.png' -F 'prompt=make the star green' \
  -F response_format=b64_json -F seed=1
