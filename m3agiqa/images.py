"""From the bytes of a file to RGB pixels, or to a reason why not. Knows nothing of corpora or models.

Importing this module lifts Pillow's own limit on pixels, which is one global for the process: `decode` states a limit
of its own, which users can set and which is checked before any pixel is decoded.
"""

import io
import warnings
from dataclasses import dataclass

import numpy as np
from PIL import (
    AvifImagePlugin,
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    Jpeg2KImagePlugin,
    JpegImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

# Importing a plug-in is what registers its format. The list is closed: some of Pillow's others start programs (EPS).
_PLUGINS = (
    AvifImagePlugin,
    BmpImagePlugin,
    GifImagePlugin,
    Jpeg2KImagePlugin,
    JpegImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)
FORMATS: tuple[str, ...] = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM")
"""Formats that are read, as Pillow names them. Which one a file is in is decided by its content."""

_REDUCING_GAP = 3.0  # Pillow's own figure for a fast reduction that cannot be told from plain Lanczos
_ORIENTATION_TAG = 0x0112
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# Both are process-wide on purpose: warnings.catch_warnings swaps a global and is not safe in threads.
Image.MAX_IMAGE_PIXELS = None
warnings.filterwarnings("ignore", module=r"PIL\.")


class ImageRejected(Exception):
    """The input is bad. The message is one line and is what the user sees in the row's `error`."""


@dataclass(frozen=True)
class DecodedImage:
    """An image that can be scored.

    Attributes:
        pixels: uint8 [height, width, 3], RGB, contiguous; no side is longer than `max_side`.
        width: of the original in pixels, after the EXIF rotation and before any downscale.
        height: likewise.
    """

    pixels: np.ndarray
    width: int
    height: int


def decode(data: bytes, *, max_pixels: int, min_side: int, max_side: int, max_aspect_ratio: float) -> DecodedImage:
    """Decodes an image to 8-bit RGB, as a viewer would show it on white.

    Transparency is composited on white, 16-bit samples are scaled to 8 bits, the EXIF orientation is applied, and an
    image whose longer side exceeds `max_side` is reduced with Lanczos. Colour profiles are not applied. Of a JPEG with
    several pictures (MPO) the first is taken. Safe in threads.

    Args:
        data: the whole file.
        max_pixels: the most pixels (width times height); checked against the header.
        min_side: the fewest pixels of the shorter side.
        max_side: the longer side of what is returned, at most.
        max_aspect_ratio: longer side over shorter side, at most.

    Raises:
        ImageRejected: empty, not an image, truncated, corrupt, animated, or outside the limits.
    """
    if not data:
        raise ImageRejected("empty file (0 bytes)")
    try:
        with _open(data) as image:
            _check_still(image)
            _check_size(*image.size, max_pixels, min_side, max_aspect_ratio)
            return _pixels(image, max_side)
    except (ImageRejected, MemoryError):
        raise
    except Exception as error:  # a parser fed foreign bytes may raise anything; the bytes are at fault
        raise ImageRejected(f"corrupt or truncated image: {_one_line(error)}") from error


def _open(data: bytes) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.UnidentifiedImageError:
        for name in FORMATS:
            accept = Image.OPEN[name][1]
            # A plug-in may answer with a str: the format is known but this Pillow was built without it.
            if accept is not None and accept(data[:32]) is True:
                raise ImageRejected(f"corrupt or truncated image: the {name} header cannot be read") from None
        begins = ascii(data[:16].decode("latin-1"))
        known = ", ".join(FORMATS)
        raise ImageRejected(f"not an image in a known format ({known}); the file begins with {begins}") from None


def _check_still(image: Image.Image) -> None:
    frames = 1 if image.format in ("JPEG", "MPO") else int(getattr(image, "n_frames", 1))
    if frames > 1:
        kind, part = ("TIFF", "page") if image.format == "TIFF" else ("animated image", "frame")
        raise ImageRejected(f"{kind} of {frames} {part}s; export one {part} as a still")


def _check_size(width: int, height: int, max_pixels: int, min_side: int, max_aspect_ratio: float) -> None:
    size = f"{width}x{height} pixels"
    if width < 1 or height < 1:
        raise ImageRejected(f"the image has no pixels ({size})")
    if width * height > max_pixels:
        raise ImageRejected(f"too large: {size} is over the limit of {max_pixels:,} pixels (images.max_pixels)")
    if min(width, height) < min_side:
        raise ImageRejected(f"too small: {size}, but the shorter side must have {min_side} or more (images.min_side)")
    ratio = max(width, height) / min(width, height)
    if ratio > max_aspect_ratio:
        limit = f"{max_aspect_ratio:g} (images.max_aspect_ratio)"
        raise ImageRejected(f"too elongated: {size} has an aspect ratio of {ratio:.1f}, over the limit of {limit}")


def _pixels(image: Image.Image, max_side: int) -> DecodedImage:
    width, height = image.size
    if max(width, height) > max_side:
        # A JPEG can be decoded at a fraction of its size; for other formats this does nothing.
        scale = max_side * _REDUCING_GAP / max(width, height)
        image.draft(None, (max(1, int(width * scale)), max(1, int(height * scale))))
    image.load()
    # Read after the pixels: a PNG may carry it behind them, and Pillow has turned a TIFF (and its size) by itself.
    orientation = _orientation(image)
    flat = _flatten(image)
    if max(width, height) > max_side:
        ratio = max_side / max(width, height)
        size = (max(1, round(width * ratio)), max(1, round(height * ratio)))
        flat = flat.resize(size, Image.Resampling.LANCZOS, reducing_gap=_REDUCING_GAP)
    if orientation in _TRANSPOSE:
        flat = flat.transpose(_TRANSPOSE[orientation])
        if orientation >= 5:
            width, height = height, width
    return DecodedImage(np.array(_as(flat, "RGB"), dtype=np.uint8, order="C"), width, height)


def _as(image: Image.Image, mode: str) -> Image.Image:
    """Converted; Pillow copies an image that has the mode already."""
    return image if image.mode == mode else image.convert(mode)


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION_TAG, 1))
    except Exception:  # noqa: BLE001 broken EXIF does not spoil the picture; it is then shown as stored
        return 1


def _flatten(image: Image.Image) -> Image.Image:
    """8-bit RGB, or L where there is no colour: a quarter of the memory until the image has been reduced."""
    if image.mode == "F":
        return _from_float(np.asarray(image))
    if image.mode.startswith("I"):
        return _from_integers(np.asarray(image))
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return _as(image, "L" if image.mode in ("1", "L") else "RGB")


def _from_integers(samples: np.ndarray) -> Image.Image:
    """16-bit grey, also where Pillow holds it in 32 bits, to 8 bits by the high byte, as Pillow does for 16-bit RGB."""
    if samples.min() < 0 or samples.max() > 65535:
        raise ImageRejected("grey values are outside 0 to 65535; export the image with 8 or 16 bits per channel")
    return Image.fromarray((samples >> 8).astype(np.uint8))


def _from_float(samples: np.ndarray) -> Image.Image:
    """Floats of 0 to 1 (a little beyond is clipped: resampling overshoots) or of 0 to 255, to 8-bit grey."""
    low, high = float(samples.min()), float(samples.max())
    if low >= -0.5 and high <= 1.5:
        samples = samples * 255.0
    elif not (low >= 0.0 and high <= 255.0):
        raise ImageRejected(f"float values from {low:g} to {high:g}: only 0 to 1 and 0 to 255 have a known white level")
    return Image.fromarray(np.clip(np.rint(samples), 0, 255).astype(np.uint8))


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."
