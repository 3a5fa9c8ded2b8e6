"""Image files that tests send and receive."""

import io

from PIL import Image


def picture(color: str | tuple[int, int, int] = "red", size: tuple[int, int] = (512, 512)) -> bytes:
    """Returns a PNG of one colour."""
    file = io.BytesIO()
    Image.new("RGB", size, color).save(file, "PNG")
    return file.getvalue()


def opened(data: bytes) -> Image.Image:
    """Returns the image of a file, decoded."""
    image = Image.open(io.BytesIO(data))
    image.load()
    return image
