"""Submits a task with Z.ai's client, polls it, and saves the image as star.png.

Needs: pip install zai-sdk
"""

import os
import sys
import time
from pathlib import Path

import httpx
from zai import ZaiClient
from zai.core import APIStatusError

client = ZaiClient(
    base_url=os.environ.get("SERVER", "http://127.0.0.1:8000") + "/api/paas/v4",
    api_key=os.environ.get("KEY", "none"),
)
try:
    task = client.images.async_generations(
        model="glm-image",
        prompt="a small red star above a blue circle on a yellow background",
        size="512x512",
        extra_body={"seed": 7},
    )
    while task.task_status == "PROCESSING":
        time.sleep(1)
        task = client.images.retrieve_images_result(task.id or "")
except APIStatusError as error:
    sys.exit(f"{error.status_code}: {error}")
if task.task_status != "SUCCESS":
    sys.exit(f"{task.task_status}: {(task.model_extra or {}).get('error')}")
for image in task.image_result or []:
    Path("star.png").write_bytes(httpx.get(image.url or "").raise_for_status().content)
print("star.png")
