"""Images as everything here takes them."""

from PIL import Image, ImageOps


class ClippedImageError(ValueError):
    """An image has more than 8 bits a channel, which the way to RGB would cut off."""


def to_rgb(image: Image.Image) -> Image.Image:
    """An image in RGB, turned the way its camera was held.

    Raises:
        ClippedImageError: for integers of 16 or 32 bits, and floating-point numbers: Pillow makes white of most.
    """
    if image.mode.startswith(("I", "F")):
        raise ClippedImageError(f"has mode {image.mode}, which would be clipped: convert it to 8 bits a channel")
    return ImageOps.exif_transpose(image).convert("RGB")
