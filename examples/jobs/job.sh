#!/usr/bin/env bash
# Submits a job, follows it through lost connections, and saves its image as star.png.
# Needs curl and jq.
set -euo pipefail
SERVER=${SERVER:-http://127.0.0.1:8000} KEY=${KEY:-none}

request() { # request CURL_OPTION...: saves a job as job.json; repeats what may succeed later
  curl -sS --retry 9 --retry-all-errors -H "Authorization: Bearer $KEY" -o job.json "$@"
  jq -e .id job.json >/dev/null || { cat job.json >&2; exit 1; }
}
ended() { [[ $(jq -r .status job.json) =~ ^(succeeded|failed|cancelled)$ ]]; }

# A second request with the same Idempotency-Key gets the first one's job. So curl may repeat it.
request "$SERVER/v1/images/jobs" \
  -H "Idempotency-Key: star-$(date +%s)-$$" -H 'Content-Type: application/json' \
  -d '{"prompt": "a small red star above a blue circle on a yellow background", "size": "512x512", "seed": 7}'
url=$SERVER/v1/images/jobs/$(jq -r .id job.json)
echo "$url"

seen=
until ended; do
  while IFS= read -r line; do
    case $line in
    'id: '*) seen=${line#id: } ;;
    'data: {"id"'*) # an event that begins otherwise is an error of the server
      echo "${line#data: }" >job.json
      jq -r '"\(.status) \(.progress * 100 | floor) %"' job.json
      ;;
    esac
  done < <(curl -sSN -H "Authorization: Bearer $KEY" -H "Last-Event-ID: $seen" "$url/events")
  ended || { sleep 1; request "$url"; } # the connection was lost
done

jq -e '.status == "succeeded"' job.json >/dev/null || { jq .error job.json >&2; exit 1; }
curl -sS --fail -o star.png "$(jq -r '.result.data[0].url' job.json)"
echo star.png
