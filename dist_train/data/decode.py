"""Read one picture as RGB; decode many, in this process or as a script of its own.

Imports nothing of this package: it is run by its path, so that a user's script needs no
`if __name__ == "__main__"` as multiprocessing would, and a decoding process starts in 0.1 s.
"""

import json
import os
import sys
from dataclasses import asdict, dataclass, field

import numpy as np
from PIL import Image, ImageOps

ORIENTATION = 0x0112  # tag of EXIF


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """A run of pictures to decode fully, and where their pixels go."""

    paths: list[str]
    height: int
    width: int
    pixels_path: str | None  # a file of uint8 (num, height, width, 3); None: only verify
    first_row: int  # of paths[0] in that file
    parent: int | None = None  # process to stop with


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What was found; empty lists are good news."""

    failed: list[str] = field(default_factory=list)  # "path: reason"
    uneven: list[str] = field(default_factory=list)  # "path is 40x30", the first of another size


def read_rgb(path: str) -> Image.Image:
    """Decode a picture fully, as RGB. Raises whatever Pillow raises for a bad one."""
    with Image.open(path) as image:
        return to_rgb(_upright(image))


def to_rgb(image: Image.Image) -> Image.Image:
    """Return an image of any mode as RGB; 16 bits are scaled, and more have no agreed white."""
    if image.mode.startswith("I;16"):  # Pillow's own conversion clips at 255
        grey = np.asarray(image) >> 8
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError(f"pixels of 32 bits (mode {image.mode}) have no agreed white")
    if "transparency" in image.info:
        return image.convert("RGBA").convert("RGB")
    return image.convert("RGB")


def largest_of_deep(image: Image.Image) -> int | None:
    """Return the largest pixel of an image of 16 bits; None: it has not so many. Decodes it."""
    return int(np.asarray(image).max()) if image.mode.startswith("I;16") else None


def deep_remark(what: str, largest: int) -> str:
    """Say what becomes of images of 16 bits.

    Args:
        what: the image that was looked at.
        largest: its largest pixel.
    """
    said = (
        f"{what} has 16 bits: such images get three equal channels of 8 bits, value // 256, so "
        "that 65535 is white"
    )
    bits = (largest >> 8).bit_length()
    if bits == 8:
        return said
    return (
        f"{said}. Its largest value is {largest}, so that only {bits} significant bits are left: "
        "a data set of your own can scale them and return float tensors"
    )


def _upright(image: Image.Image) -> Image.Image:
    """Decode the picture and turn it as its EXIF orientation says."""
    image.load()
    try:
        turned = image.getexif().get(ORIENTATION, 1) not in (0, 1)
    except (
        Exception
    ):  # Pillow raises nearly anything for broken EXIF data of a picture that is whole
        return image
    return ImageOps.exif_transpose(image) if turned else image


def why_unreadable(error: Exception) -> str:
    """Say in a few words why `read_rgb` failed."""
    if isinstance(error, Image.UnidentifiedImageError):
        return "is no picture that Pillow can read"
    return f"cannot be decoded ({str(error) or type(error).__name__})"


def decode(job: Job) -> Outcome:
    """Decode every picture of the job and write those of its size to the pixels file."""
    outcome = Outcome()
    picture_bytes = job.height * job.width * 3
    pixels = None if job.pixels_path is None else os.open(job.pixels_path, os.O_WRONLY)
    for row, path in enumerate(job.paths, start=job.first_row):
        if job.parent is not None and os.getppid() != job.parent:
            break  # an orphan: nobody reads the outcome
        try:
            image = read_rgb(path)
        except Exception as error:  # Pillow's plugins raise nearly anything for a broken file
            outcome.failed.append(f"{path} {why_unreadable(error)}")
            continue
        if (image.height, image.width) != (job.height, job.width):
            if not outcome.uneven:
                outcome.uneven.append(f"{path} is {image.width}x{image.height}")
        elif pixels is not None:
            os.pwrite(pixels, image.tobytes(), row * picture_bytes)
    if pixels is not None:
        os.close(pixels)
    return outcome


if __name__ == "__main__":
    for line in sys.stdin:  # a job; its outcome is one line, too
        sys.stdout.write(json.dumps(asdict(decode(Job(**json.loads(line))))) + "\n")
        sys.stdout.flush()
