"""Streams an image with OpenAI's client: saves two previews while it is made, then the image.

Needs: pip install openai
"""

import base64
import os
import sys
from pathlib import Path

from openai import APIError, OpenAI

client = OpenAI(
    base_url=os.environ.get("SERVER", "http://127.0.0.1:8000") + "/v1",
    api_key=os.environ.get("KEY", "none"),
)
try:
    for event in client.images.generate(
        prompt="a large white triangle on black",
        size="512x512",
        stream=True,
        partial_images=2,
        extra_body={"seed": 7},
    ):
        if event.type == "image_generation.partial_image":
            file = Path(f"preview-{event.partial_image_index}.png")
        else:
            file = Path("triangle.png")
        file.write_bytes(base64.b64decode(event.b64_json))
        print(f"{event.type}: {file}")
except APIError as error:  # before the stream, or in the middle of it
    sys.exit(error.message)
