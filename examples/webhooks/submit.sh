#!/usr/bin/env bash
# Submits a job whose end is reported to receiver.py.
# Needs curl, and a server whose outbound.allow contains 127.0.0.1:9000.
set -euo pipefail
SERVER=${SERVER:-http://127.0.0.1:8000} KEY=${KEY:-none} WEBHOOK=${WEBHOOK:-http://127.0.0.1:9000/}

curl -sS --fail-with-body "$SERVER/v1/images/jobs" \
  -H "Authorization: Bearer $KEY" -H 'Content-Type: application/json' \
  -d '{"prompt": "a small red star above a blue circle on a yellow background", "size": "512x512", "seed": 7,
       "webhook_url": "'"$WEBHOOK"'"}'
