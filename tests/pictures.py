"""Picture files for tests: noise, bombs, and where they are saved."""
import struct
import zlib

import numpy as np
from PIL import Image


def noise(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(seed).integers(0, 256, size=shape, dtype=np.uint8)


def labelled(count: int = 24, channels: int = 3, size: int = 16, classes: int = 2):
    """An `ImageSet` of noise whose classes come in turn."""
    import torch

    from vlm_course.foundations.images import ImageSet

    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (count, channels, size, size), generator=generator)
    names = [f"class {k}" for k in range(classes)]
    return ImageSet(images.to(torch.uint8), torch.arange(count) % classes, names)


def save(path, array=None, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noise(8, 8) if array is None else array).save(path, **options)
    return path


def png_chunk(kind: bytes, content: bytes) -> bytes:
    check = struct.pack(">I", zlib.crc32(kind + content))
    return struct.pack(">I", len(content)) + kind + content + check


def bomb(width: int, height: int) -> bytes:
    """A complete, tiny PNG file that declares `width` x `height` pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [png_chunk(b"IHDR", header), png_chunk(b"IDAT", zlib.compress(b"\0"))]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks) + png_chunk(b"IEND", b"")
