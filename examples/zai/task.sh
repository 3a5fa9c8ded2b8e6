#!/usr/bin/env bash
# Submits a task by Z.ai's API, polls it, and saves the image as star.png.
# Needs curl and jq.
set -euo pipefail
SERVER=${SERVER:-http://127.0.0.1:8000} KEY=${KEY:-none}
curl=(curl -sS --fail-with-body -H "Authorization: Bearer $KEY")

task=$("${curl[@]}" "$SERVER/api/paas/v4/async/images/generations" -H 'Content-Type: application/json' \
  -d '{"model": "glm-image", "prompt": "a small red star above a blue circle on a yellow background",
       "size": "512x512", "seed": 7}') || { echo "$task" >&2; exit 1; }
url=$SERVER/api/paas/v4/async-result/$(jq -r .id <<<"$task")

while [[ $(jq -r .task_status <<<"$task") == PROCESSING ]]; do
  sleep 1
  task=$("${curl[@]}" --retry 9 --retry-connrefused "$url")
done
[[ $(jq -r .task_status <<<"$task") == SUCCESS ]] || { jq .error <<<"$task" >&2; exit 1; }
curl -sS --fail -o star.png "$(jq -r '.image_result[0].url' <<<"$task")"
echo star.png
