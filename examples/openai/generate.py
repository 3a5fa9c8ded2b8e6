"""Generates two images with OpenAI's client and saves them as star-0.png and star-1.png.

Needs: pip install openai
"""

import base64
import os
import sys
from pathlib import Path

from openai import APIConnectionError, APIStatusError, OpenAI

client = OpenAI(
    base_url=os.environ.get("SERVER", "http://127.0.0.1:8000") + "/v1",
    api_key=os.environ.get("KEY", "none"),
)
try:
    answer = client.images.generate(
        prompt="a small red star above a blue circle on a yellow background",
        n=2,
        size="512x512",
        response_format="b64_json",
        extra_body={"seed": 7},  # of the first image; the second one has seed 8
    )
except APIConnectionError as error:  # there is no server, or no answer within ten minutes
    sys.exit(f"{client.base_url}: {error}")
except APIStatusError as error:  # the client has already repeated what can be repeated
    sys.exit(f"{error.status_code}: {error.message}")
for number, image in enumerate(answer.data or []):
    file = Path(f"star-{number}.png")
    file.write_bytes(base64.b64decode(image.b64_json or ""))
    print(file)
