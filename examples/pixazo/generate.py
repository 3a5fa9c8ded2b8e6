"""Submits a request by Pixazo's API, polls it, and saves the image as star.jpeg.

Needs: pip install httpx
"""

import os
import sys
import time
from pathlib import Path

import httpx

SERVER = os.environ.get("SERVER", "http://127.0.0.1:8000")
KEY = {"Ocp-Apim-Subscription-Key": os.environ.get("KEY", "none")}

answer = httpx.post(
    f"{SERVER}/glm-image/v1/glm-image-request",
    json={
        "prompt": "a small red star above a blue circle on a yellow background",
        "image_size": "square",
        "num_inference_steps": 8,
        "seed": 7,
    },
    headers=KEY,
)
if answer.is_error:
    sys.exit(answer.json()["error"]["message"])
request = answer.json()
while request["status"] in ("QUEUED", "PROCESSING"):
    time.sleep(1)
    request = httpx.get(request["polling_url"], headers=KEY).raise_for_status().json()
if request["status"] != "COMPLETED":
    sys.exit(f"{request['status']}: {request['error']['message']}")
Path("star.jpeg").write_bytes(httpx.get(request["output"]["media_url"][0]).raise_for_status().content)
print("star.jpeg, seed", request["seed"])
