"""Decode a picture from its bytes to RGB, by what the bytes are and never by the file's name.

Plain JPEGs go through simplejpeg, everything else through Pillow; both use libjpeg-turbo with the accurate transform,
so the two paths agree on every pixel. A plain JPEG can also be decoded at 1/2, 1/4 or 1/8 of its size, which libjpeg
does inside the inverse transform. Transparency goes over white, EXIF rotation is applied.
"""

from __future__ import annotations

import io
import struct
import threading
import warnings
from typing import NamedTuple

import numpy as np
import simplejpeg
from PIL import Image, ImageOps, features

MAX_PIXELS = 64_000_000
MIN_SIDE = 16
MAX_ASPECT = 20
# Of a progressive JPEG. Writers make about 10; each costs a pass over all pixels, 31 bytes of file buy 40 ms.
MAX_SCANS = 100
# Pillow's other formats run interpreters, guess, or read other files.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF") + (("AVIF",) if features.check("avif") else ())

SCALE_FACTORS = (8, 4, 2, 1)

_EXIF_ORIENTATION = 0x0112
_FIRST_TRANSPOSED = 5  # orientations from here on exchange height and width
_START_OF_FRAME = frozenset({0xC0, 0xC1, 0xC2})
_PROGRESSIVE = frozenset({0xC2, 0xC6, 0xCA, 0xCE})
_START_OF_SCAN = 0xDA
_APP1 = 0xE1
_STANDALONE = frozenset({0x01, *range(0xD0, 0xD9)})
# Luma sampling factors, horizontal and vertical, that simplejpeg decodes; chroma must be 1 x 1.
_SAMPLINGS = frozenset({(1, 1), (2, 1), (2, 2), (1, 2), (4, 1)})


class BadSampleError(Exception):
    """The content of a sample cannot be used. Its `reason` is one of few words that are counted."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class _Silence:
    """Let no warning out while any thread is within.

    `warnings.catch_warnings` in several threads at once leaves the filters of one of them behind, for good.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._depth = 0
        self._filters = warnings.catch_warnings(action="ignore")

    def __enter__(self) -> None:
        with self._lock:
            if self._depth == 0:
                self._filters = warnings.catch_warnings(action="ignore")
                self._filters.__enter__()
            self._depth += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._depth -= 1
            if self._depth == 0:
                self._filters.__exit__(None, None, None)


without_warnings = _Silence()


class JpegHeader(NamedTuple):
    """What decides how a JPEG is decoded."""

    height: int
    width: int
    simple: bool  # 8-bit grey or YCbCr in a common sampling
    orientation: int  # EXIF, 1 is upright
    progressive: bool = False


class PlainJpeg:
    """A JPEG that simplejpeg decodes, of acceptable size.

    Args:
        content: the file.
        header: its header, with `simple` set.
    """

    def __init__(self, content: bytes, header: JpegHeader) -> None:
        self._content = content
        self._header = header
        self.height, self.width = header.height, header.width
        if header.orientation >= _FIRST_TRANSPOSED:
            self.height, self.width = self.width, self.height  # of the upright picture

    def decode(self, *, factor: int = 1) -> np.ndarray:
        """Return the upright picture as uint8 [ceil(H / factor), ceil(W / factor), 3].

        Factors are 1, 2, 4 and 8: libjpeg's other scales are slower than decoding every pixel.

        Raises:
            BadSampleError: the picture is damaged.
        """
        assert factor in SCALE_FACTORS
        smallest = {}
        if factor > 1:
            smallest = {"min_height": -(-self._header.height // factor), "min_width": -(-self._header.width // factor)}
        try:
            pixels = simplejpeg.decode_jpeg(
                self._content, colorspace="RGB", fastdct=False, fastupsample=False, **smallest
            )
        except ValueError as error:
            raise BadSampleError("undecodable") from error
        return _upright(pixels, self._header.orientation)


def open_plain_jpeg(content: bytes) -> PlainJpeg | None:
    """Read the header of a JPEG; None for any other picture and for JPEGs that only Pillow decodes.

    Raises:
        BadSampleError: the picture is too large, too small or too narrow, or takes minutes.
    """
    if content[:3] != b"\xff\xd8\xff":
        return None
    header = jpeg_header(content)
    if header is not None and header.progressive:
        _check_scans(content)
    if header is None or not header.simple:
        return None
    check_pixels(header.width, header.height)
    check_shape(header.width, header.height)
    return PlainJpeg(content, header)


def decode_image(content: bytes) -> np.ndarray:
    """Return the upright picture as uint8 [H, W, 3], RGB, transparency over white.

    Raises:
        BadSampleError: the picture is damaged, of an unknown format, too large, too small or too narrow.
    """
    jpeg = open_plain_jpeg(content)
    if jpeg is not None:
        return jpeg.decode()
    image = open_image(content)
    check_shape(*image.size)
    try:
        with without_warnings:  # of damage that does not matter; what matters raises
            ImageOps.exif_transpose(image, in_place=True)
            return np.array(to_rgb(image))  # writable, as torch wants it
    except MemoryError:
        raise
    except Exception as error:  # decoders raise whatever damaged bytes lead them to
        raise BadSampleError("undecodable") from error


def open_image(content: bytes) -> Image.Image:
    """Open a picture by its header alone, and check that decoding it is bounded before any pixel is decoded.

    Raises:
        BadSampleError: the format is unknown or not allowed, the picture has more than 64 million pixels, or it takes
            minutes.
    """
    if not content:
        raise BadSampleError("empty_image")
    with without_warnings:  # of large pictures and odd metadata; the limits are ours
        try:
            image = Image.open(io.BytesIO(content), formats=FORMATS)
        except Image.DecompressionBombError as error:
            raise BadSampleError("too_many_pixels") from error
        except Exception as error:
            raise BadSampleError("unknown_format") from error
    if image.format == "MPO":  # a JPEG with more pictures behind it, as phones write them
        image.format = "JPEG"
    if "progressive" in image.info:
        _check_scans(content)
    check_pixels(*image.size)
    return image


def check_pixels(width: int, height: int) -> None:
    """Check that a picture may be decoded at all.

    Raises:
        BadSampleError: it has more than 64 million pixels.
    """
    if width * height > MAX_PIXELS:
        raise BadSampleError("too_many_pixels")


def _check_scans(content: bytes) -> None:
    """Refuse a progressive JPEG that takes minutes, on every machine alike; no other marker looks like a scan's."""
    if content.count(bytes((0xFF, _START_OF_SCAN))) > MAX_SCANS:
        raise BadSampleError("too_many_scans")


def check_shape(width: int, height: int) -> None:
    """Check that a picture is fit for training.

    Raises:
        BadSampleError: a side is under 16 pixels, or the sides are beyond 20:1.
    """
    if min(width, height) < MIN_SIDE:
        raise BadSampleError("too_small")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise BadSampleError("too_narrow")


def to_rgb(image: Image.Image) -> Image.Image:
    """Return a picture of any mode as RGB: transparency over white, 16-bit and float values scaled to 8 bits."""
    if image.mode == "RGB" and "transparency" not in image.info:
        image.load()
        return image
    if image.mode[0] in "IF":
        return Image.fromarray(_scale_to_uint8(image)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        over_white = Image.new("RGB", image.size, (255, 255, 255))
        over_white.paste(image, mask=image)
        return over_white
    return image.convert("RGB")


def _scale_to_uint8(image: Image.Image) -> np.ndarray:
    """Scale grey values: 16-bit by the range of the type, wider ones and floats by their own minimum and maximum."""
    values = np.asarray(image).astype(np.float64)
    if image.mode.startswith("I;16") or (image.mode == "I" and values.min() >= 0 and values.max() < 2**16):
        low, high = 0.0, 65535.0
    else:
        finite = values[np.isfinite(values)]
        low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
        values = np.nan_to_num(values, nan=low, posinf=high, neginf=low)
    return np.rint((values - low) * (255.0 / (high - low or 1.0))).astype(np.uint8)


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Undo an EXIF orientation: 2-4 mirror and turn by 180 degrees, 5-8 also exchange the axes."""
    if orientation in (3, 4, 6, 7):
        pixels = pixels[::-1]
    if orientation in (2, 3, 7, 8):
        pixels = pixels[:, ::-1]
    if orientation >= _FIRST_TRANSPOSED:
        pixels = pixels.transpose(1, 0, 2)
    return np.ascontiguousarray(pixels)


def jpeg_header(content: bytes) -> JpegHeader | None:
    """Read size, sampling and orientation from a JPEG's markers; None if they make no sense."""
    position, orientation = 2, 1
    try:
        while True:
            marker, length = struct.unpack_from(">xBH", content, position)
            if content[position] != 0xFF:
                return None
            if marker == 0xFF or marker in _STANDALONE:
                position += 1 if marker == 0xFF else 2
                continue
            if marker == _START_OF_SCAN:
                return None
            body = position + 4
            if marker == _APP1 and content[body : body + 6] == b"Exif\0\0":
                orientation = _exif_orientation(content[body + 6 : position + 2 + length])
            elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
                precision, height, width, components = struct.unpack_from(">BHHB", content, body)
                simple = marker in _START_OF_FRAME and precision == 8 and _is_common_sampling(content, body, components)
                return JpegHeader(height, width, simple and height > 0, orientation, marker in _PROGRESSIVE)
            position += 2 + length
    except (struct.error, IndexError):
        return None


def _is_common_sampling(content: bytes, body: int, components: int) -> bool:
    factors = [divmod(content[body + 7 + 3 * i], 16) for i in range(components)]
    if components == 1:
        return True
    return components == 3 and factors[0] in _SAMPLINGS and factors[1] == factors[2] == (1, 1)


def _exif_orientation(tiff: bytes) -> int:
    """Return the orientation tag of an EXIF block's first directory, 1 if there is none or it is damaged."""
    endian = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if endian is None:
        return 1
    try:
        (directory,) = struct.unpack_from(f"{endian}I", tiff, 4)
        (count,) = struct.unpack_from(f"{endian}H", tiff, directory)
        for i in range(count):
            tag, _, _, value = struct.unpack_from(f"{endian}HHIH", tiff, directory + 2 + 12 * i)
            if tag == _EXIF_ORIENTATION:
                return value if 1 <= value <= 8 else 1
    except struct.error:
        pass
    return 1
