"""Submits a job, follows it through lost connections, and saves its image as star.png.

Needs: pip install httpx
"""

import json
import os
import sys
import time
import uuid
from pathlib import Path
from typing import Any

import httpx

JOBS = os.environ.get("SERVER", "http://127.0.0.1:8000") + "/v1/images/jobs"
KEY = {"Authorization": f"Bearer {os.environ.get('KEY', 'none')}"}


def submit(body: dict[str, Any]) -> Any:
    """Submits a job, and repeats the request until there is an answer.

    The server gives all requests with one Idempotency-Key the same job. A program that may be restarted
    stores the key before it sends the request.
    """
    headers = KEY | {"Idempotency-Key": str(uuid.uuid4())}
    while True:
        try:
            answer = httpx.post(JOBS, json=body, headers=headers, timeout=60)
            if answer.is_success:
                return answer.json()
            if answer.is_client_error and answer.status_code != 429:
                sys.exit(answer.json()["error"]["message"])
            print(f"status {answer.status_code}")
        except httpx.TransportError as error:
            print(f"no answer: {error}")
        time.sleep(1)


def follow(job: Any) -> Any:
    """Prints the job's progress, and returns the ended job."""
    seen = ""
    while True:
        headers = KEY | {"Last-Event-ID": seen}
        try:
            # A silent stream has a comment every 15 s. Longer silence means that the connection is lost.
            with httpx.stream("GET", f"{JOBS}/{job['id']}/events", headers=headers, timeout=30) as events:
                if events.is_client_error:
                    sys.exit(events.read().decode())
                for line in events.iter_lines():
                    name, _, value = line.partition(": ")
                    if name == "id":
                        seen = value
                    elif name == "data" and "status" in (data := json.loads(value)):
                        job = data
                        print(f"{job['status']} {job['progress']:.0%}")
        except httpx.TransportError as error:
            print(f"connection lost: {error}")
        if job["status"] not in ("queued", "running"):
            return job
        time.sleep(1)


PROMPT = "a small red star above a blue circle on a yellow background"
job = follow(submit({"prompt": PROMPT, "size": "512x512", "seed": 7}))
if job["status"] != "succeeded":
    sys.exit(f"{job['status']}: {job.get('error')}")
Path("star.png").write_bytes(httpx.get(job["result"]["data"][0]["url"]).raise_for_status().content)
print("star.png")
