"""Turn a pair of an input into the members of a sample, and say why where that cannot be."""

from __future__ import annotations

import hashlib
import io
import json

from PIL import Image

from clip_train.data.captions import decode_caption
from clip_train.data.images.decode import BadSampleError, decode_image, open_image
from clip_train.data.shards.inputs.pair import Content, Pair

_EXTENSION_BY_FORMAT = {"JPEG": "jpg", "TIFF": "tif"}


def examine(pair: Pair) -> float:
    """Check that a pair can be trained on, and return a number in [0, 1) that depends on the picture's bytes only.

    Raises:
        BadSampleError: it has no usable caption, or its picture is missing or cannot be decoded.
    """
    read_captions(pair)
    content = _read_picture(pair)
    decode_image(content)
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "big") / 2**64


def members(pair: Pair, *, resize: int | None, quality: int) -> dict[str, bytes]:
    """Return a sample's content by extension: picture, `txt`, what came along, several captions also as `json`.

    Args:
        pair: one that can be used.
        resize: shorten the short side to this many pixels where it is longer; None keeps the file as it is.
        quality: JPEG quality of resized photographs; other formats become PNG.

    Raises:
        BadSampleError: the pair cannot be used after all.
    """
    captions = read_captions(pair)
    content = _read_picture(pair)
    # The header alone tells the format, and refuses huge pictures before a pixel is decoded.
    image_format = open_image(content).format or ""
    extension = _EXTENSION_BY_FORMAT.get(image_format, image_format.lower())
    if resize is not None:
        pixels = decode_image(content)
        if min(pixels.shape[:2]) > resize:
            extension = "jpg" if extension == "jpg" else "png"
            content = _shrink(Image.fromarray(pixels), short_side=resize, extension=extension, quality=quality)
    parts = {extension: content, "txt": captions[0]}
    if len(captions) > 1:
        texts = [caption.decode("utf-8") for caption in captions]
        parts["json"] = json.dumps({"captions": texts}, ensure_ascii=False).encode()
    for name, extra in pair.extras:
        found = extra.read() if isinstance(extra, Content) else extra
        if found is not None:
            parts[name] = found
    return parts


def read_captions(pair: Pair) -> list[bytes]:
    """Return a pair's captions as they are stored, unusable ones among several left out.

    Raises:
        BadSampleError: none can be used.
    """
    if isinstance(pair.captions, Content):
        content = pair.captions.read()
        if content is None:
            raise BadSampleError("caption_missing")
        decode_caption(content)
        return [content]
    captions, reason = [], "caption_missing"
    for caption in pair.captions:
        if caption is None:
            reason = "caption_not_text"
            continue
        try:
            decode_caption(encoded := caption.encode("utf-8", "surrogatepass"))
            captions.append(encoded)
        except BadSampleError as error:
            reason = error.reason
    if not captions:
        raise BadSampleError(reason)
    return captions


def _read_picture(pair: Pair) -> bytes:
    content = pair.image.read()
    if content is None:
        raise BadSampleError("image_missing")
    return content


def _shrink(image: Image.Image, *, short_side: int, extension: str, quality: int) -> bytes:
    factor = short_side / min(image.size)
    size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
    buffer = io.BytesIO()
    resized = image.resize(size, Image.Resampling.BICUBIC)
    if extension == "jpg":
        resized.save(buffer, "JPEG", quality=quality)
    else:
        resized.save(buffer, "PNG")
    return buffer.getvalue()
