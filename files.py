"""Errors told in one line, files written whole or not at all, pictures decoded once."""

import argparse
import contextlib
import hashlib
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NoReturn

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

try:
    import fcntl
except ImportError:  # Windows: folders are not locked there
    fcntl = None

PICTURE = re.compile(r"\.(jpe?g|jfif|png|gif|webp|avif|bmp|p[gp]m|tiff?)$", re.I)
JUNK = re.compile(r"\.|(@eaDir|__MACOSX|#recycle|lost.found|Thumbs.db|\w+_boxes.txt)$", re.I)
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

    That is a UserError, a file that cannot be read or written, or too little memory. Ctrl-C or a
    closed pipe ends with status 130. Any other exception is a bug and keeps its traceback.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed from the start
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))
        if hasattr(getattr(sys, name), "reconfigure"):
            getattr(sys, name).reconfigure(errors="replace")
    advice = "make room, allow it or name another place; what was written before is kept"
    try:
        yield
        sys.stdout.flush()
    except UserError as error:
        parser.error(str(error))
    except (KeyboardInterrupt, BrokenPipeError):
        raise SystemExit(130) from None
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
    finally:
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except OSError:  # at exit it would fail again
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


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
    handle = os.open(folder if fcntl else os.devnull, os.O_RDONLY)
    try:
        if fcntl:
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
    """The picture files below a folder, by their relative names in sorted order. Junk of programs
    is skipped, other files and empty folders are named, a link to a folder above leads nowhere."""
    names, others, errors = [], [], []
    for folder, inner, files in os.walk(root, onerror=errors.append, followlinks=True):
        here = Path(folder)
        above = {a for p in (here, *here.parents) for a in (p.resolve(), *p.resolve().parents)}
        inner[:] = [i for i in inner if not JUNK.match(i) and (here / i).resolve() not in above]
        files = [here / file for file in files if not JUNK.match(file)]
        for path in files or [here] * (not inner and here != root):
            part = names if PICTURE.search(path.name) and path.is_file() else others
            part.append(path.relative_to(root).as_posix())
    if errors and root.exists():
        raise UserError(f"cannot read {errors[0].filename} ({errors[0].strerror}): allow it")
    bare = {o.partition("/")[0] for o in others} - {n.partition("/")[0] for n in names}
    if first := [*sorted(bare), *sorted({*others} - bare)][:9]:
        print(f"note      {root}: {len(others)} left out, no pictures: {first}", file=sys.stderr)
    return sorted(names)


def stamp(path: Path) -> str:
    """A file's size and time, which change with its content."""
    return "{0.st_size} {0.st_mtime_ns}".format(path.stat()) if path.is_file() else ""


def decoded(root: Path, names: list[str], side: int, crop: int | None, kept: Path) -> np.ndarray:
    """The named pictures of a folder as uint8 (N, 3, side, side), kept in a file. They are decoded
    again when a picture is new or gone, or has another size or time."""
    lines = [f"{name} {stamp(root / name)}\n" for name in names]
    source = f"{side} {crop}\n{''.join(lines)}".encode(errors="surrogateescape")

    def blocks() -> Iterator[np.ndarray]:
        odd = []
        with ThreadPoolExecutor() as pool:
            for i in range(0, len(names), BLOCK):
                tasks = [pool.submit(decode, root / n, side, crop) for n in names[i : i + BLOCK]]
                odd += [str(task.exception()) for task in tasks if task.exception()]
                if not odd:
                    yield np.stack([task.result() for task in tasks])
        if odd:
            what = f"{len(odd)} of {len(names)} pictures are damaged: {', '.join(odd[:5])}"
            raise UserError(f"{what}: get them again or delete them")

    return cached(kept, (len(names), 3, side, side), hashlib.sha256(source).hexdigest(), blocks())


def decode(path: Path, side: int, crop: int | None) -> np.ndarray:
    """A picture as uint8 (3, side, side): the middle square, of `crop` pixels or as large as fits,
    resized (bilinear, antialiased). It is turned as its EXIF data say, 16 bits are scaled to 8, and
    what is transparent shows grey. Of several frames it is the first."""
    try:
        with Image.open(path) as picture:
            ImageOps.exif_transpose(picture, in_place=True)
            if picture.mode[0] in "IF":  # more than 8 bits; a TIFF's bits, zero and kind of number
                tags = {258: (16,), 262: 1, 339: (1,)} | dict(getattr(picture, "tag_v2", {}))
                if (tags[258], tags[262], tags[339]) != ((16,), 1, (1,)):
                    raise ValueError("neither 8 nor 16 bits from black to white: save it so")
                picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
            grey = Image.new("RGBA", picture.size, (128, 128, 128))
            seen = picture.has_transparency_data
            rgb = Image.alpha_composite(grey, picture.convert("RGBA")) if seen else picture
            rgb = rgb.convert("RGB")
            square = min(*rgb.size, crop or rgb.width)
            x, y = ((length - square) // 2 for length in rgb.size)
            rgb = rgb.resize((side, side), Image.BILINEAR, (x, y, x + square, y + square))
    except Exception as error:  # Pillow raises many kinds for damaged files
        raise UserError(f"{path} ({error})") from None
    return np.asarray(rgb).transpose(2, 0, 1)


def cached(path: Path, shape: tuple, signature: str, blocks: Iterable[np.ndarray]) -> np.ndarray:
    """The uint8 array of a .npy file, memory-mapped; writing to it never reaches the file. It is
    made of `blocks`, in order, unless its .source file has this signature and the array's stamp."""
    mark = path.with_suffix(".source")
    if not mark.is_file() or mark.read_bytes() != f"{signature} {stamp(path)}".encode():
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
        mark.write_text(f"{signature} {stamp(path)}")
    return np.load(path, mmap_mode="c")
