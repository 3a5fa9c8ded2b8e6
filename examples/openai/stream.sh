#!/usr/bin/env bash
# Streams an image: saves two previews while it is made, then the image.
# Needs curl and jq.
set -euo pipefail
SERVER=${SERVER:-http://127.0.0.1:8000} KEY=${KEY:-none}

# -N prints each event as soon as it arrives. A comment of the server every 15 s keeps the connection alive.
curl -sSN --fail-with-body "$SERVER/v1/images/generations" \
  -H "Authorization: Bearer $KEY" -H 'Content-Type: application/json' \
  -d '{"prompt": "a large white triangle on black", "size": "512x512", "seed": 7,
       "stream": true, "partial_images": 2, "output_format": "webp"}' |
  while IFS= read -r line || [[ $line ]]; do # an error has no newline at its end
    case $line in
    'data: '*)
      event=${line#data: }
      # An error after the start of the stream is an event, since the status has been sent.
      kind=$(jq -r '.type // error(.error.message)' <<<"$event")
      case $kind in
      *.partial_image) file=preview-$(jq .partial_image_index <<<"$event").webp ;;
      *.completed) file=triangle.webp ;;
      esac
      jq -r .b64_json <<<"$event" | base64 -d >"$file"
      echo "$kind: $file"
      ;;
    '{'*) echo "$line" >&2 ;; # the server refuses the request
    esac
  done
