"""Edits with two source images: generates star.png and circle.png, and makes edited.png of both.

Needs: pip install openai. (The demo was trained on one source image. It edits the first.)
"""

import base64
import os
import sys
from pathlib import Path

from openai import APIError, OpenAI
from openai.types import ImagesResponse

client = OpenAI(
    base_url=os.environ.get("SERVER", "http://127.0.0.1:8000") + "/v1",
    api_key=os.environ.get("KEY", "none"),
)


def save(answer: ImagesResponse, file: Path) -> Path:
    """Saves the image of an answer."""
    for image in answer.data or []:
        file.write_bytes(base64.b64decode(image.b64_json or ""))
    print(file)
    return file


def generate(prompt: str, file: Path) -> Path:
    """Generates an image, and returns its file."""
    answer = client.images.generate(
        prompt=prompt, size="512x512", response_format="b64_json", extra_body={"seed": 1}
    )
    return save(answer, file)


try:
    star = generate("a red star on a white background", Path("star.png"))
    circle = generate("a green circle on a white background", Path("circle.png"))
    edited = client.images.edit(
        image=[star, circle],  # one to four, in the order in which the model reads them
        prompt="make the star green",
        response_format="b64_json",
        extra_body={"seed": 1},
    )
    save(edited, Path("edited.png"))
except APIError as error:
    sys.exit(error.message)
