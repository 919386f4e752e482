"""Files: written whole or not at all; pictures in folders and zips, decoded once.

    writing   a path to write to, which takes the place of another when it is whole
    Files     what lies below a folder or in a zip, by name
    decoded   pictures as one uint8 tensor

What is decoded lies in a file that is made where it is missing or no longer up to date, by all
cores, and is read through a memory map.
"""

import contextlib
import hashlib
import io
import math
import mmap
import os
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import joblib
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

try:
    import fcntl
except ImportError:  # Windows: of two runs that start at once both may decode
    fcntl = None

PICTURES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
BLOCK = 512  # images decoded together


class UserError(Exception):
    """A mistake or an outside failure that one line can explain; programs exit with status 2."""


@contextlib.contextmanager
def writing(path: Path, replace: bool = True) -> Iterator[Path]:
    """Gives a path to write to, renamed to `path` at the end: that file is whole or as it was.

    With replace=False it gives `path` itself. UserError where the disk does not take it.
    """
    beside = path.with_name(path.name + ".tmp") if replace else path
    try:
        yield beside
        if replace:
            os.replace(beside, path)
    except (OSError, RuntimeError) as error:  # torch.save raises the latter on a full disk
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        kept = "what was there before is kept; " if path.exists() else ""
        raise UserError(
            f"cannot write {path} ({reason}): {kept}make room or name another folder"
        ) from None
    finally:
        if replace:
            beside.unlink(missing_ok=True)


class Files:
    """The files below a folder, or in a zip, by their relative names in sorted order.

    `stamps` has of each its size and its time of change, or its checksum in a zip.
    """

    def __init__(self, root: Path):
        self.root, self.zip = root, None
        try:
            if root.is_dir():
                found = {}
                for folder, _, names in os.walk(root, followlinks=True):
                    base = os.path.relpath(folder, root).replace(os.sep, "/")
                    for name in names:
                        stat = os.stat(os.path.join(folder, name))
                        key = name if base == "." else f"{base}/{name}"
                        found[key] = (stat.st_size, stat.st_mtime_ns)
            else:
                self.zip = zipfile.ZipFile(root)
                found = {i.filename: (i.file_size, i.CRC) for i in self.zip.infolist()}
        except (OSError, zipfile.BadZipFile) as error:
            raise UserError(f"{root} cannot be read ({error}): get it again") from None
        self.stamps = dict(sorted(found.items()))

    def read(self, name: str) -> bytes:
        try:
            return self.zip.read(name) if self.zip else (self.root / name).read_bytes()
        except (OSError, KeyError, zipfile.BadZipFile, zlib.error) as error:
            raise UserError(f"{self.root}: {name} cannot be read ({error}): get it again") from None

    def text(self, name: str) -> str:
        return self.read(name).decode("utf-8", errors="replace")

    def pictures(self, folder: str) -> list[str]:
        """The picture files below a folder ("" or ending in /)."""
        return [
            name for name in self.stamps
            if name.startswith(folder) and name.lower().endswith(PICTURES)
            and not name.rpartition("/")[2].startswith("._")  # what macOS leaves beside each file
        ]  # fmt: skip


def decoded(files: Files, names: list[str], side: int, crop: int | None, path: Path) -> Tensor:
    """The named pictures as (N, 3, side, side), from `path` where they have been decoded before."""
    lines = "".join(f"{name} {files.stamps[name]}\n" for name in names)
    signature = hashlib.sha256(f"{side} {crop}\n{lines}".encode()).hexdigest()

    def blocks() -> Iterable[np.ndarray]:
        parts = (names[i : i + BLOCK] for i in range(0, len(names), BLOCK))
        jobs = 1 if len(names) < 8 * BLOCK else -1  # processes take seconds to start
        work = joblib.Parallel(jobs, return_as="generator", max_nbytes=None)
        return work(joblib.delayed(decode)(files.root, part, side, crop) for part in parts)

    return cached(path, (len(names), 3, side, side), signature, blocks)


def decode(root: Path, names: list[str], side: int, crop: int | None) -> np.ndarray:
    """Pictures of a folder or zip as uint8 (N, 3, side, side): the middle square, of `crop` pixels
    or as large as fits, resized (bilinear, antialiased). Grey ones get three equal channels."""
    archive = zipfile.ZipFile(root) if root.is_file() else None
    images = np.empty((len(names), 3, side, side), np.uint8)
    for i, name in enumerate(names):
        try:
            file = io.BytesIO(archive.read(name)) if archive else root / name  # checks the CRC
            with Image.open(file) as picture:
                width, height = picture.size
                square = min(width, height, crop or width)
                left, top = (width - square) // 2, (height - square) // 2
                box = (left, top, left + square, top + square)
                rgb = picture.convert("RGB").resize((side, side), Image.Resampling.BILINEAR, box)
        except Exception as error:  # Pillow raises many kinds for damaged files
            reason = str(error) or type(error).__name__
            raise UserError(
                f"{root}: {name} is not a whole image ({reason}): get it again or delete it"
            ) from None
        images[i] = np.asarray(rgb).transpose(2, 0, 1)
    return images


def cached(
    path: Path, shape: tuple[int, ...], signature: str, blocks: Callable[[], Iterable[np.ndarray]]
) -> Tensor:
    """A uint8 array that lies in `path`, memory-mapped. Where that is not there whole or was made
    from a source with another signature, it is first made of `blocks`, in order."""

    def opened() -> Tensor | None:
        try:
            if mark.read_text() != signature:
                return None
            with open(path, "rb") as file:
                np.lib.format.read_magic(file)
                header, start = np.lib.format.read_array_header_1_0(file), file.tell()
                # Copy on write: nothing that is done to the tensor reaches the file.
                pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except (OSError, ValueError):
            return None
        if header[0] != shape or len(pages) != start + math.prod(shape):
            return None
        images = torch.from_numpy(np.frombuffer(pages, np.uint8, offset=start).reshape(shape))
        images.pages = pages  # for `take`
        return images

    mark = path.with_suffix(".source")
    found = opened()
    if found is not None:
        return found
    with writing(path.parent, replace=False):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = open(path.parent / "lock", "w")  # noqa: SIM115
    with lock:
        if fcntl is not None:
            fcntl.flock(lock, fcntl.LOCK_EX)  # another process may be making it just now
        found = opened()
        if found is not None:
            return found
        mark.unlink(missing_ok=True)
        with writing(path) as beside, open(beside, "wb") as file:
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            interval = 0.5 if sys.stderr.isatty() else 15  # seconds between lines of the bar
            with tqdm(total=shape[0], desc=f"decoding {path.stem}", unit="image", leave=False,
                      mininterval=interval, disable=shape[0] < 8 * BLOCK) as bar:  # fmt: skip
                for block in blocks():
                    file.write(block.tobytes())
                    bar.update(len(block))
        with writing(mark) as beside:
            beside.write_text(signature)
    return opened()
