"""Data sets as uint8 tensors that fit on the device, and batches of them.

    digits        1,797 handwritten digits that come with scikit-learn, 28x28, no download
    mnist         60,000 + 10,000, 28x28
    fashionmnist  60,000 + 10,000, 28x28

The last two are read in torchvision's layout below a data folder (FashionMNIST/raw/*-ubyte, plain
or .gz), from the folder of Debian's package dataset-fashion-mnist, or downloaded by torchvision.
"""

import contextlib
import gzip
import io
import os
import socket
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class UserError(Exception):
    """A mistake or an outside failure that one line can explain; programs exit with status 2."""


class Data(NamedTuple):
    """Images (N, C, H, W) uint8 and labels (N,) int64 of both splits, and the labels' names."""

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor
    classes: tuple[str, ...]

    def to(self, device: torch.device | str) -> "Data":
        moved = [t.to(device) for t in (self.train, self.train_labels, self.test, self.test_labels)]
        return Data(*moved, self.classes)


DIGITS = tuple("0123456789")
FASHION = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat",
    "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
DATASETS = ("digits", "mnist", "fashionmnist")
DEBIAN_FASHION = Path("/usr/share/datasets/fashion-mnist")


def load(name: str, data_dir: str | os.PathLike = "data", download: bool = True) -> Data:
    """A data set on the CPU. Raises UserError with the ways to get it where it cannot be had."""
    if name == "digits":
        return _digits()
    if name == "mnist":
        return _mnist("MNIST", Path(data_dir), DIGITS, [], download)
    if name == "fashionmnist":
        return _mnist("FashionMNIST", Path(data_dir), FASHION, [DEBIAN_FASHION], download)
    raise UserError(f"unknown data set {name!r}: choose {', '.join(DATASETS)}")


# --------------------------------------------------------------------------------------------------
# digits


def _digits() -> Data:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)  # (1797, 64), values 0 to 16
    images = torch.from_numpy(images).float().view(-1, 1, 8, 8) * (255 / 16)
    images = torch.nn.functional.interpolate(images, size=(28, 28), mode="bilinear")
    images, labels = images.round().to(torch.uint8), torch.from_numpy(labels).long()
    train, test = train_test_split(
        np.arange(len(labels)), test_size=360, stratify=labels.numpy(), random_state=0
    )
    return Data(images[train], labels[train], images[test], labels[test], DIGITS)


# --------------------------------------------------------------------------------------------------
# MNIST and its kin

SPLITS = {"train": 60_000, "t10k": 10_000}


def _mnist(
    name: str, data_dir: Path, classes: tuple[str, ...], elsewhere: list[Path], download: bool
) -> Data:
    folders = [data_dir / name / "raw", data_dir, *elsewhere]
    folder = next((f for f in folders if not _missing(f)), None)
    if folder is None:
        if not download:
            where = ", ".join(str(f) for f in folders)
            raise UserError(f"no {name} in {where}. {_ways(name, data_dir)}")
        folder = folders[0]
        _download(name, data_dir, folder)
    arrays = []
    for split, count in SPLITS.items():
        images = read_idx(_file(folder, f"{split}-images-idx3-ubyte"), ndim=3)
        labels = read_idx(_file(folder, f"{split}-labels-idx1-ubyte"), ndim=1)
        if images.shape != (count, 28, 28) or len(labels) != count or labels.max() > 9:
            raise UserError(
                f"{folder}: {split} holds images {tuple(images.shape)} and {len(labels)} labels, "
                f"not {count} of 28x28 in 10 classes. {_ways(name, data_dir)}"
            )
        arrays += [images.unsqueeze(1), labels.long()]
    return Data(*arrays, classes)


def _file(folder: Path, stem: str) -> Path:
    plain = folder / stem
    return plain if plain.is_file() else folder / f"{stem}.gz"


def _missing(folder: Path) -> list[str]:
    stems = [f"{s}-{kind}-ubyte" for s in SPLITS for kind in ("images-idx3", "labels-idx1")]
    return [stem for stem in stems if not _file(folder, stem).is_file()]


def read_idx(path: Path, ndim: int) -> Tensor:
    """A uint8 array in Yann LeCun's IDX format, plain or gzip. UserError where it is not whole."""
    advice = "delete it and get it again"
    try:
        raw = path.read_bytes()
        if path.suffix == ".gz":
            raw = gzip.decompress(raw)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read ({error}): {advice}") from None
    header = 4 + 4 * ndim
    if len(raw) < header or raw[:4] != bytes([0, 0, 8, ndim]):
        raise UserError(f"{path} is not an IDX file of {ndim} dimensions: {advice}")
    shape = tuple(int(n) for n in np.frombuffer(raw, ">u4", ndim, offset=4))
    if len(raw) != header + int(np.prod(shape)):
        raise UserError(
            f"{path} is truncated or damaged: {len(raw) - header} bytes of data where its header "
            f"promises {'x'.join(map(str, shape))}: {advice}"
        )
    return torch.from_numpy(np.frombuffer(raw, np.uint8, offset=header).reshape(shape).copy())


def _ways(name: str, data_dir: Path) -> str:
    debian = "; or apt-get install dataset-fashion-mnist" if name == "FashionMNIST" else ""
    return (
        f"Ways to get it: put the four *-ubyte files (plain or .gz) into {data_dir / name / 'raw'}"
        f"; or name the folder above {name}/ with --data-dir; or run where the network is{debian}; "
        "or take --dataset digits, which needs none"
    )


def _download(name: str, data_dir: Path, folder: Path) -> None:
    from torchvision import datasets

    missing = _missing(folder)
    found = f" {folder} lacks {', '.join(missing)}." if len(missing) < 4 else ""
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(30)
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # each mirror tried is a line there
            getattr(datasets, name)(str(data_dir), download=True)
    except Exception as error:  # whatever torchvision and the network raise, the user needs a way
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(
            f"{name} could not be downloaded ({reason}).{found} {_ways(name, data_dir)}"
        ) from None
    finally:
        socket.setdefaulttimeout(timeout)


# --------------------------------------------------------------------------------------------------
# Where and in what precision


def pick_device(name: str) -> torch.device:
    """The device named "auto" (CUDA where there is one), "cpu", "cuda" or "cuda:N"."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cpu":
        return torch.device("cpu")
    kind, _, index = name.partition(":")
    if kind != "cuda" or not (index.isdigit() or name == "cuda"):
        raise UserError(f"unknown device {name!r}: choose auto, cpu, cuda or cuda:N")
    if not torch.cuda.is_available():
        raise UserError(f"device {name}: PyTorch sees no CUDA device here: choose --device cpu")
    if index and int(index) >= torch.cuda.device_count():
        raise UserError(f"device {name}: this machine has {torch.cuda.device_count()} CUDA devices")
    return torch.device(name)


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """ "float32", "bfloat16", or "auto": bfloat16 where the processor has instructions for it."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        fast = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # older PyTorch lacks it
        fast = capabilities.get("avx512_bf16", False) or capabilities.get("amx_bf16", False)
    return torch.bfloat16 if fast else torch.float32


# --------------------------------------------------------------------------------------------------
# Batches


def to_unit(images: Tensor) -> Tensor:
    """uint8 images to float32 in [0, 1]."""
    return images.float() / 255


def binarize(images: Tensor) -> Tensor:
    """A fresh binary image, float32 0 or 1, each pixel 1 with probability value/255."""
    noise = torch.rand(images.shape, device=images.device)
    return (noise < to_unit(images)).float()


def shuffled(images: Tensor, batch_size: int, seed: int, epoch: int) -> list[Tensor]:
    """The batches of an epoch as index tensors, the last one smaller.

    A function of seed and epoch alone, so that a run can go on in the middle of an epoch.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = torch.randperm(len(images), generator=generator).to(images.device)
    return list(order.split(batch_size))


def in_order(images: Tensor, batch_size: int = 512) -> Iterator[Tensor]:
    """All images once, batch by batch."""
    return iter(images.split(batch_size))
