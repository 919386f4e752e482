"""Errors told in one line, files written whole or not at all, pictures decoded once."""

import argparse
import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

PICTURES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
BLOCK = 512  # images decoded together


class UserError(Exception):
    """A mistake or an outside failure that one line can explain."""


class Parser(argparse.ArgumentParser):
    """Errors in one line, exit status 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


@contextlib.contextmanager
def one_line(parser: Parser) -> Iterator[None]:
    """The edge of a command. What its user can mend ends in one line and exit status 2.

    That is a UserError, a file that cannot be read or written, or too little memory. Ctrl-C ends
    with status 130. Any other exception is a bug and keeps its traceback.
    """
    advice = "make room or name another place; what was written before is kept"
    try:
        yield
    except UserError as error:
        parser.error(str(error))
    except OSError as error:
        name, reason = error.filename or "a file", error.strerror or error
        parser.error(f"cannot read or write {name}: {reason}: {advice}")
    except RuntimeError as error:
        text = repr((error, error.__context__))  # recording a CUDA graph hides the first error
        if "OutOfMemory" in text or "allocate memory" in text:
            less = "lower --batch-size, --channels or --latents, or take --update sampled"
            parser.error(f"out of memory: {less}")
        if "inline_container" in text:  # torch.save on a full disk
            parser.error(f"cannot write a checkpoint: {advice}")
        raise
    except KeyboardInterrupt:
        raise SystemExit(130) from None


@contextlib.contextmanager
def writing(path: Path) -> Iterator[Path]:
    """Gives PATH.tmp to write to, renamed at the end, so that `path` is never half-written."""
    beside = path.with_name(f"{path.name}.tmp")
    try:
        yield beside
        os.replace(beside, path)
    except OSError as error:
        error.filename = error.filename or str(beside)  # a full disk names no file
        raise
    finally:
        beside.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps other processes out of a run's folder; UserError where one is in. The system unlocks it
    when a process ends, however it ends. The folder is made where it is not, and removed again if
    nothing was written."""
    made = [place for place in (folder, folder.parent) if not place.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        wait = "wait for it, or name another folder with --out"
        raise UserError(f"{folder} is in use by another process: {wait}") from None
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            for place in made:
                place.rmdir()
        os.close(handle)


def write_json(path: Path, content: dict) -> None:
    with writing(path) as beside:
        beside.write_text(json.dumps(content) + "\n")


def pictures(root: Path) -> list[str]:
    """The picture files below a folder, by their relative names in sorted order."""
    names = []
    for folder, _, files in os.walk(root, followlinks=True):
        base = Path(folder).relative_to(root)
        for file in files:  # macOS leaves a ._NAME beside each NAME
            if file.lower().endswith(PICTURES) and not file.startswith("._"):
                names.append((base / file).as_posix())
    return sorted(names)


def decoded(root: Path, names: list[str], side: int, crop: int | None, kept: Path) -> Tensor:
    """The named pictures of a folder as uint8 (N, 3, side, side), kept in a file.

    They are decoded again when a picture is new or gone, or has another size or time.
    """
    paths = [root / name for name in names]
    stats = [path.stat() for path in paths]
    lines = [f"{n} {(s.st_size, s.st_mtime_ns)}\n" for n, s in zip(names, stats, strict=True)]
    signature = hashlib.sha256(f"{side} {crop}\n{''.join(lines)}".encode()).hexdigest()
    with ThreadPoolExecutor() as pool:
        parts = (paths[i : i + BLOCK] for i in range(0, len(paths), BLOCK))
        blocks = (np.stack([*pool.map(decode, p, repeat(side), repeat(crop))]) for p in parts)
        return cached(kept, (len(paths), 3, side, side), signature, blocks)


def decode(path: Path, side: int, crop: int | None) -> np.ndarray:
    """A picture as uint8 (3, side, side): the middle square, of `crop` pixels or as large as fits,
    resized (bilinear, antialiased). A grey one gets three equal channels."""
    try:
        with Image.open(path) as picture:
            width, height = picture.size
            square = min(width, height, crop or width)
            left, top = (width - square) // 2, (height - square) // 2
            box = (left, top, left + square, top + square)
            rgb = picture.convert("RGB").resize((side, side), Image.Resampling.BILINEAR, box)
    except Exception as error:  # Pillow raises many kinds for damaged files
        what = f"{path} is not a whole image ({error})"
        raise UserError(f"{what}: get it again or delete it") from None
    return np.asarray(rgb).transpose(2, 0, 1)


def cached(path: Path, shape: tuple, signature: str, blocks: Iterable[np.ndarray]) -> Tensor:
    """The uint8 array of a .npy file, memory-mapped; writing to it never reaches the file. It is
    made of `blocks`, in order, unless its .source file already holds this signature."""
    mark = path.with_suffix(".source")
    if not (path.is_file() and mark.is_file() and mark.read_text() == signature):
        path.parent.mkdir(parents=True, exist_ok=True)
        mark.unlink(missing_ok=True)
        own = path.with_suffix(f".{os.getpid()}")  # another process may be making it, too
        with writing(own) as beside, open(beside, "wb") as file:
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            total = -(-shape[0] // BLOCK)
            for block in tqdm(blocks, f"decoding {path.stem}", total, leave=False, disable=None):
                file.write(block.tobytes())
        os.replace(own, path)
        mark.write_text(signature)
    return torch.from_numpy(np.load(path, mmap_mode="c"))
