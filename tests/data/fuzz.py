"""Random damage to tars and pictures."""

import io
import random
import tarfile

import numpy as np
from PIL import Image, features

from tests.data.made import encoded


def mutated(content: bytes, rng: random.Random) -> bytes:
    """Damage bytes in one of many ways; the result always differs."""
    data = bytearray(content)
    place = rng.randrange(len(data))
    kind = rng.randrange(6)
    if kind == 0:
        for _ in range(rng.choice([1, 1, 2, 8, 64])):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif kind == 1:
        del data[place:]
    elif kind == 2:
        length = min(rng.choice([1, 16, 512, 5000]), len(data) - place)
        data[place : place + length] = bytes(length)
    elif kind == 3:
        length = min(rng.choice([1, 16, 512, 5000]), len(data) - place)
        data[place : place + length] = rng.randbytes(length)
    elif kind == 4:
        del data[place : place + rng.choice([1, 7, 512])]
    else:
        data[place:place] = data[rng.randrange(len(data)) :][: rng.choice([1, 7, 512])]
    if bytes(data) == content:
        data.append(1)
    return bytes(data)


def tar_of(samples: dict[str, dict[str, bytes]], *, tar_format: int, rng: random.Random) -> bytes:
    """Write samples, each a dict of contents by extension, with what other tools put between members."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tar_format) as tar:
        for name, members in samples.items():
            if rng.random() < 0.1:
                folder = tarfile.TarInfo(f"folder-{name}")
                folder.type = tarfile.DIRTYPE
                tar.addfile(folder)
            for extension, content in members.items():
                info = tarfile.TarInfo(f"{name}.{extension}")
                info.size = len(content)
                if tar_format == tarfile.PAX_FORMAT and rng.random() < 0.5:
                    info.pax_headers = {"comment": "x" * rng.randrange(900)}
                tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def odd_member(rng: random.Random) -> bytes:
    """Return header blocks, with a right checksum, that no shard should hold, or that change the next member."""
    info = tarfile.TarInfo("odd.jpg")
    kind = rng.choice([b"1", b"2", b"3", b"4", b"6", b"S", b"L", b"K", b"x", b"g", b"?", b"5"])
    info.type, info.linkname = kind, "00001.jpg"
    payload = {
        b"L": b"long-name.jpg\0",
        b"K": b"long-link\0",
        b"x": rng.choice([b"20 path=elsewhere.j\n", b"22 GNU.sparse.major=1\n", b"13 size=1000\n", b"99 path=a\n"]),
        b"g": b"19 comment=nothing\n",
    }.get(kind, b"")
    info.size = len(payload)
    return info.tobuf(tarfile.USTAR_FORMAT) + payload + bytes(-len(payload) % 512)


def pictures() -> dict[str, bytes]:
    """Return small pictures in twelve formats."""
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 255, (48, 56, 3), dtype=np.uint8)
    rgb = Image.fromarray(np.kron(noise[::4, ::4], np.ones((4, 4, 1), dtype=np.uint8)))
    grey16 = Image.fromarray((rng.random((40, 40)) * 65535).astype(np.uint16))
    real = Image.fromarray(rng.random((40, 40)).astype(np.float32))
    frames = [rgb.rotate(angle) for angle in (90, 180)]
    made = {
        "jpeg": encoded(rgb, "JPEG", quality=80),
        "jpeg progressive": encoded(rgb, "JPEG", progressive=True),
        "jpeg grey": encoded(rgb.convert("L"), "JPEG"),
        "jpeg cmyk": encoded(rgb.convert("CMYK"), "JPEG"),
        "png": encoded(rgb),
        "png palette": encoded(rgb.convert("P"), transparency=3),
        "png 16 bit": encoded(grey16),
        "webp": encoded(rgb, "WEBP", quality=70),
        "webp animated": encoded(rgb.convert("RGBA"), "WEBP", save_all=True, append_images=frames, lossless=True),
        "gif animated": encoded(rgb, "GIF", save_all=True, append_images=frames),
        "bmp": encoded(rgb, "BMP"),
        "tiff float": encoded(real, "TIFF"),
    }
    if features.check("avif"):
        made["bmp"], made["avif"] = made.pop("bmp"), encoded(rgb, "AVIF", speed=10)
    return made
