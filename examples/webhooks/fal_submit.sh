#!/usr/bin/env bash
# Submits a request to fal's queue whose end is reported to fal_receiver.py.
# Needs curl, and a server whose outbound.allow contains 127.0.0.1:9000.
set -euo pipefail
SERVER=${SERVER:-http://127.0.0.1:8000} KEY=${KEY:-none} WEBHOOK=${WEBHOOK:-http://127.0.0.1:9000/}

# If the webhook's URL has a query of its own, encode it: fal_webhook=https%3A%2F%2F…
curl -sS --fail-with-body "$SERVER/queue/fal-ai/glm-image?fal_webhook=$WEBHOOK" \
  -H "Authorization: Key $KEY" -H 'Content-Type: application/json' \
  -d '{"prompt": "a small red star above a blue circle on a yellow background", "image_size": "square",
       "num_inference_steps": 10, "seed": 7}'
