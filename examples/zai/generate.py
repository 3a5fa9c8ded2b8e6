"""Generates an image with Z.ai's client and saves it as star.png.

Needs: pip install zai-sdk
"""

import os
import sys
from pathlib import Path

import httpx
from zai import ZaiClient
from zai.core import APIStatusError

client = ZaiClient(
    base_url=os.environ.get("SERVER", "http://127.0.0.1:8000") + "/api/paas/v4",
    api_key=os.environ.get("KEY", "none"),
    timeout=600,  # by default the client gives up after 300 s, and sends the request again
)
try:
    answer = client.images.generations(
        model="glm-image",
        prompt="a small red star above a blue circle on a yellow background",
        size="512x512",
        extra_body={"seed": 7},
    )
except APIStatusError as error:
    sys.exit(f"{error.status_code}: {error}")
Path("star.png").write_bytes(httpx.get(answer.data[0].url or "").raise_for_status().content)
print("star.png")
