"""Data sets as uint8 tensors, and batches of them. What only one data set needs is imported there.

Data sets are read below a data folder in their official layout, or downloaded there. A zip is
unpacked beside itself. What is decoded or resized is kept in decoded/ below the data folder.
"""

import gzip
import os
import socket
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from files import BLOCK, UserError, cached, decoded, pictures, stamp


class Data(NamedTuple):
    """Images (N, C, H, W) uint8 and labels (N,) int64 of both splits, and the labels' names.

    Labels are None and classes empty where the images have none. `unlabelled` images, where there
    are some, are those to train on; `train` keeps its part in the probe.
    """

    train: Tensor
    train_labels: Tensor | None
    test: Tensor
    test_labels: Tensor | None
    classes: tuple[str, ...]
    unlabelled: Tensor | None = None

    @property
    def to_train_on(self) -> Tensor:
        return self.train if self.unlabelled is None else self.unlabelled


DIGITS = tuple("0123456789")
SHAPES = {  # channels, height, width
    "digits": (1, 28, 28),  # 1,797 handwritten digits that come with scikit-learn, no download
    "mnist": (1, 28, 28),  # 60,000 + 10,000
    "fashionmnist": (1, 28, 28),  # 60,000 + 10,000
    "cifar10": (3, 32, 32),  # 50,000 + 10,000, 10 classes
    "cifar100": (3, 32, 32),  # 50,000 + 10,000, 100 classes
    "stl10": (3, 32, 32),  # 5,000 + 8,000, and 100,000 unlabelled, resized from 96x96, 10 classes
    "tinyimagenet": (3, 64, 64),  # 100,000 + 10,000, its validation split, 200 classes
    "celeba": (3, 64, 64),  # 162,770 + 19,962 aligned faces, resized, no classes
    "folder": (3, 32, 32),  # images of any size in train/ and test/, in a folder a class or in none
}
DEBIAN_FASHION = Path("/usr/share/datasets/fashion-mnist")


def image_shape(name: str, image_size: int | None = None) -> tuple[int, int, int]:
    """(channels, height, width) of a data set's images; `image_size` is for "folder" alone."""
    if image_size is None:
        return SHAPES[name]
    if name != "folder":
        raise UserError(f"--image-size is for --dataset folder: {name} has images of its own size")
    if not 8 <= image_size <= 1024:
        raise UserError(f"--image-size {image_size}: choose from 8 to 1024 pixels")
    return (3, image_size, image_size)


def load(
    name: str,
    data_dir: str | os.PathLike = "data",
    download: bool = True,
    image_size: int | None = None,
    unlabelled: bool = False,
    threshold: bool = False,
    validation: bool = False,
    train_images: int | None = None,
) -> Data:
    """A data set on the CPU. Raises UserError with the ways to get it where it cannot be had.

    `image_size` is the side of the images of "folder" (default 32). `unlabelled` adds STL-10's
    unlabelled images. `threshold` makes grey images black and white: 255 where a pixel is above
    127, else 0. `validation` leaves the test split out: the last 10,000 training images, at most a
    fifth of them, take its place. `train_images` keeps so many to train on, the first. Where images
    come class by class, evenly spaced ones stand for the last and the first.
    """
    folder = Path(data_dir)
    channels, side, _ = image_shape(name, image_size)
    if unlabelled and name != "stl10":
        raise UserError(f"--unlabelled is for --dataset stl10: {name} has no unlabelled split")
    if threshold and channels > 1:
        raise UserError(f"--threshold is for grey images: those of {name} have colours")
    if name == "digits":
        data = _digits()
    elif name in ("mnist", "fashionmnist"):
        data = _mnist(name, folder, download)
    elif name in ("cifar10", "cifar100"):
        data = _cifar(name, folder, download)
    elif name == "stl10":
        data = _stl10(folder, download, unlabelled)
    elif name == "tinyimagenet":
        data = _tinyimagenet(folder, download)
    elif name == "celeba":
        data = _celeba(folder, download)
    else:
        data = _folder(folder, side)
    data = Data(*(torch.from_numpy(x) if isinstance(x, np.ndarray) else x for x in data))
    if threshold:
        train, test = ((images > 127).to(torch.uint8) * 255 for images in (data.train, data.test))
        data = data._replace(train=train, test=test)
    by_class = name in ("tinyimagenet", "folder")
    if validation:
        n = len(data.train)
        held_out, count = torch.zeros(n, dtype=torch.bool), min(10_000, n // 5)
        if count == 0:
            raise UserError(f"--validation: {n} training images are too few, take 5 or more")
        held_out[evenly(n, count) if by_class else slice(n - count, n)] = True
        parts = [[x if x is None else x[rows] for x in data[:2]] for rows in (~held_out, held_out)]
        data = Data(*parts[0], *parts[1], *data[4:])
    if train_images is not None:
        if train_images > len(data.to_train_on):
            raise UserError(f"--train-images {train_images}: there are {len(data.to_train_on):,}")
        rows = evenly(len(data.train), train_images) if by_class else slice(train_images)
        parts = [x if x is None else x[rows] for x in (*data[:2], data.unlabelled)]
        data = Data(*parts[:2], *data[2:5], parts[2])
    for split, labels in (("training", data.train_labels), ("test", data.test_labels)):
        if lost := [label for k, label in enumerate(data.classes) if k not in labels]:
            print(f"note      {len(lost)} classes lack {split} images: {lost[:9]}", file=sys.stderr)
    return data


def evenly(images: int, n: int) -> Tensor:
    """The indices of n of so many images, or of all, evenly spaced."""
    n = min(n, images)
    return torch.arange(n) * images // n


PLACES = {
    "mnist": "the four *-ubyte files (plain or .gz) into {}/MNIST/raw",
    "fashionmnist": "the four *-ubyte files (plain or .gz) into {}/FashionMNIST/raw; or "
    "apt-get install dataset-fashion-mnist",
    "cifar10": "cifar-10-python.tar.gz, or the folder cifar-10-batches-py in it, into {}",
    "cifar100": "cifar-100-python.tar.gz, or the folder cifar-100-python in it, into {}",
    "stl10": "stl10_binary.tar.gz, or the folder stl10_binary in it, into {}",
    "tinyimagenet": "tiny-imagenet-200.zip, or the folder tiny-imagenet-200 in it, into {}",
    "celeba": "img_align_celeba.zip (or the folder) and list_eval_partition.txt into {}/celeba",
}


def _wrong(name: str, data_dir: Path, what: str) -> UserError:
    """Says what is wrong with a data set, and the ways to get it."""
    ways = f"put {PLACES[name].format(data_dir)}; or name another folder with --data-dir; or run"
    ways += " where the network is; or take --dataset digits, which needs none"
    return UserError(f"{name}: {what}. Ways to get it: {ways}")


def _get(name: str, data_dir: Path, lacking: str, get: Callable, *args, **options) -> object:
    """What get(*args, **options) returns, which may download; UserError where it raises."""
    socket.setdefaulttimeout(30)  # seconds
    try:
        return get(*args, **options)
    except Exception as error:  # whatever torchvision and the network raise, the user needs a way
        raise _wrong(name, data_dir, f"{lacking} ({repr(error)[:200]})") from None


def _unpack(archive: Path) -> None:
    """Unpacks the folder in a zip, which has the same name, beside it: whole or not at all."""
    folder = archive.with_suffix("")
    with tempfile.TemporaryDirectory(dir=archive.parent, suffix=".tmp") as temporary:
        try:
            zipfile.ZipFile(archive).extractall(temporary)
        except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, RuntimeError) as error:
            raise UserError(f"{archive} cannot be unpacked ({error}): get it again") from None
        if not folder.exists():  # another process may have unpacked it, too
            os.replace(Path(temporary, folder.name), folder)


def _digits() -> Data:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)  # (1797, 64), values 0 to 16
    images = torch.from_numpy(images).float().view(-1, 1, 8, 8) * (255 / 16)
    images = torch.nn.functional.interpolate(images, size=(28, 28), mode="bilinear")
    images, labels = images.round().to(torch.uint8), torch.from_numpy(labels).long()
    train, test = train_test_split(range(1797), test_size=360, stratify=labels, random_state=0)
    return Data(images[train], labels[train], images[test], labels[test], DIGITS)


IDX = {  # of MNIST and FashionMNIST
    "train-images-idx3-ubyte": (60_000, 28, 28),
    "train-labels-idx1-ubyte": (60_000,),
    "t10k-images-idx3-ubyte": (10_000, 28, 28),
    "t10k-labels-idx1-ubyte": (10_000,),
}


def _mnist(name: str, data_dir: Path, download: bool) -> Data:
    from torchvision import datasets

    kind = {"mnist": datasets.MNIST, "fashionmnist": datasets.FashionMNIST}[name]
    raw = data_dir / kind.__name__ / "raw"
    folders = [raw, data_dir, DEBIAN_FASHION][: 3 if name == "fashionmnist" else 2]
    folder = next((f for f in folders if all(path.is_file() for path in _idx(f))), raw)
    if missing := [path.stem for path in _idx(folder) if not path.is_file()]:
        lacking = f"{raw} lacks {', '.join(missing)}"
        _get(name, data_dir, lacking, kind, str(data_dir), download=download)
    train, train_labels, test, test_labels = map(read_idx, _idx(folder), IDX.values())
    classes = DIGITS if name == "mnist" else tuple(kind.classes)
    return Data(train[:, None], train_labels.long(), test[:, None], test_labels.long(), classes)


def _idx(folder: Path) -> list[Path]:
    """The four files, or .gz where there is no plain one."""
    plain = [folder / name for name in IDX]
    return [path if path.is_file() else path.with_suffix(".gz") for path in plain]


def read_idx(path: Path, shape: tuple[int, ...]) -> Tensor:
    """The uint8 array in an IDX file, plain or gzip. UserError unless it is whole, of `shape`."""
    header = bytes([0, 0, 8, len(shape)]) + np.array(shape, ">u4").tobytes()
    try:
        raw = path.read_bytes()
        raw = gzip.decompress(raw) if path.suffix == ".gz" else raw
        array = np.frombuffer(raw.removeprefix(header), np.uint8).reshape(shape)
        if len(shape) == 1 and array.max() > 9:
            raise ValueError(f"a label is {array.max()}")
    except (OSError, EOFError, zlib.error, ValueError) as error:
        what = f"{path} is not a whole IDX file of shape {shape} ({error})"
        raise UserError(f"{what}: delete it and get it again") from None
    return torch.from_numpy(array.copy())


def _torchvision(name: str, kind: type, data_dir: Path, download: bool, **split) -> object:
    """An instance of torchvision's class, downloaded where it is not whole and that is allowed."""
    try:
        return kind(str(data_dir), **split)
    except (RuntimeError, OSError):
        from torchvision.datasets.utils import check_integrity

        base, listed = data_dir / kind.base_folder, [*kind.train_list, *kind.test_list]
        odd = ", ".join(file for file, md5 in listed if not check_integrity(base / file, md5))
        lacking = f"{base} lacks {odd or 'a file'}, or it is damaged"
        return _get(name, data_dir, lacking, kind, str(data_dir), download=download, **split)


def _cifar(name: str, data_dir: Path, download: bool) -> Data:
    from torchvision import datasets

    kind = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    tensors = []
    for train in (True, False):
        split = _torchvision(name, kind, data_dir, download, train=train)
        tensors.append(torch.from_numpy(split.data).permute(0, 3, 1, 2).contiguous())
        tensors.append(torch.tensor(split.targets))
    return Data(*tensors, tuple(split.classes))


def _stl10(data_dir: Path, download: bool, unlabelled: bool) -> Data:
    from torchvision import datasets
    from torchvision.transforms.v2.functional import resize

    class Kind(datasets.STL10):  # its 2.6 GB of unlabelled images only where they are asked for
        train_list = datasets.STL10.train_list[: 3 if unlabelled else 2]

    base = data_dir / Kind.base_folder
    if not all((base / file).is_file() for file, _ in [*Kind.train_list, *Kind.test_list]):
        _torchvision("stl10", Kind, data_dir, download, split="test")

    def resized(split: str) -> np.ndarray:
        def blocks() -> Iterator[np.ndarray]:  # of images (N, 3, 96, 96)
            images = _torchvision("stl10", Kind, data_dir, False, split=split).data
            for start in range(0, len(images), BLOCK):
                part = torch.from_numpy(images[start : start + BLOCK])
                yield resize(part, [32, 32], antialias=True).numpy()

        source, path = base / f"{split}_X.bin", data_dir / "decoded" / f"stl10-{split}.npy"
        shape = (source.stat().st_size // (3 * 96 * 96), 3, 32, 32)
        return cached(path, shape, stamp(source), blocks())

    tensors = []
    for split in ("train", "test"):
        images = resized(split)
        labels = torch.from_numpy(np.fromfile(base / f"{split}_y.bin", np.uint8)).long() - 1
        if len(labels) != len(images) or not 0 <= labels.min() <= labels.max() < 10:
            raise _wrong("stl10", data_dir, f"{split}_y.bin needs {len(images)} labels, 1 to 10")
        tensors += [images, labels]
    classes = tuple((base / Kind.class_names_file).read_text().split())
    return Data(*tensors, classes, resized("unlabeled") if unlabelled else None)


def _tinyimagenet(data_dir: Path, download: bool) -> Data:
    folder, archive = data_dir / "tiny-imagenet-200", data_dir / "tiny-imagenet-200.zip"
    root = data_dir if (data_dir / "wnids.txt").is_file() else folder
    if not root.is_dir():
        if not archive.is_file():
            lacking = f"neither {folder} nor {archive} is there"
            if not download:
                raise _wrong("tinyimagenet", data_dir, lacking)
            from torchvision.datasets.utils import download_url

            url = f"http://cs231n.stanford.edu/{archive.name}"
            md5 = "90528d7ca1a48142e341f4ef8d21d0de"
            _get("tinyimagenet", data_dir, lacking, download_url, url, data_dir, archive.name, md5)
        _unpack(archive)
    wnids = sorted((root / "wnids.txt").read_text(errors="replace").split())
    label_of = {wnid: label for label, wnid in enumerate(wnids)}
    train = [f for f in pictures(root / "train") if f.partition("/")[0] in label_of]
    train_labels = [label_of[file.partition("/")[0]] for file in train]  # WNID/images/WNID_7.JPEG
    if missing := set(range(len(wnids))) - set(train_labels):
        raise _wrong("tinyimagenet", data_dir, f"{root} has no images of {wnids[min(missing)]}")
    # The test images of all classes lie in one folder. This file tells which is which.
    lines = (root / "val/val_annotations.txt").read_text(errors="replace").splitlines()
    wnid_of = dict(f"{line}\t".split("\t")[:2] for line in lines)
    test = pictures(root / "val/images")
    if odd := sorted(set(test) ^ {file for file, wnid in wnid_of.items() if wnid in label_of}):
        raise _wrong("tinyimagenet", data_dir, f"{root}/val lacks {odd[0]} or its annotation")
    rows = (root / "words.txt").read_text(errors="replace").splitlines()
    words = dict(row.partition("\t")[::2] for row in rows)
    kept = data_dir / "decoded"
    return Data(
        decoded(root / "train", train, 64, None, kept / "tinyimagenet-train.npy"),
        torch.tensor(train_labels),
        decoded(root / "val/images", test, 64, None, kept / "tinyimagenet-test.npy"),
        torch.tensor([label_of[wnid_of[file]] for file in test]),
        tuple(words.get(wnid, wnid).split(",")[0].strip() for wnid in wnids),
    )


def _celeba(data_dir: Path, download: bool) -> Data:
    def find(*names: str) -> Path | None:
        folders = [data_dir / base for base in ("celeba", "celeba/Img", "celeba/Eval", ".")]
        return next((f / n for n in names for f in folders if (f / n).exists()), None)

    lists = ("list_eval_partition.txt", "list_eval_partition.csv")
    if not (find(*lists) and find("img_align_celeba", "img_align_celeba.zip")):
        lacking = f"{data_dir}/celeba lacks list_eval_partition.txt or img_align_celeba"
        from torchvision import datasets

        _get("celeba", data_dir, lacking, datasets.CelebA, str(data_dir), download=download)
    if not find("img_align_celeba"):
        _unpack(find("img_align_celeba.zip"))
    partition, root = find(*lists), find("img_align_celeba")
    lines = partition.read_text(errors="replace").splitlines()
    rows = [line.replace(",", " ").split() for line in lines if line.strip()]
    if not {"0", "2"} <= {" ".join(row[1:]) for row in rows} - {"partition"} <= {"0", "1", "2"}:
        raise UserError(f"{partition} is no list of names with 0, 1 or 2: get it again")
    path_of = {name.rpartition("/")[2]: name for name in pictures(root)}
    images = []
    for split, number in (("train", "0"), ("test", "2")):  # 1: validation
        names = [row[0] for row in rows if row[1] == number]
        if missing := [name for name in names if name not in path_of]:
            what = f"{root} lacks {missing[0]} and {len(missing) - 1} more images"
            raise UserError(f"{what} that {partition.name} names: unpack the zip again")
        kept = data_dir / "decoded" / f"celeba-{split}.npy"
        images.append(decoded(root, [path_of[name] for name in names], 64, 148, kept))  # the face
    return Data(images[0], None, images[1], None, ())


def _folder(root: Path, side: int) -> Data:
    names = [pictures(root / split) for split in ("train", "test")]
    if not all(names):
        raise UserError(f"{root} needs images in train/ and test/, in a folder a class or in none")
    classes = [[n.partition("/")[0] if "/" in n else "" for n in part] for part in names]
    known = sorted(set(classes[0]))
    if len(known) > 1 and "" in known:
        raise UserError(f"{root / 'train'} has images beside the class folders: move them into one")
    if len(known) > 1 and (odd := sorted(set(classes[1]) - set(known))):
        what = f"the class {odd[0]!r}" if odd[0] else "images outside the class folders"
        raise UserError(f"{root / 'test'} has {what}, which {root / 'train'} has not")
    train, test = (
        decoded(root / split, part, side, None, root / "decoded" / f"folder-{split}-{side}.npy")
        for split, part in zip(("train", "test"), names, strict=True)
    )
    if len(known) == 1:  # says no more than none
        return Data(train, None, test, None, ())
    train_labels, test_labels = (torch.tensor([known.index(c) for c in part]) for part in classes)
    return Data(train, train_labels, test, test_labels, tuple(known))


def place(data: Data, device: torch.device) -> Data:
    """The data with their images in the memory of a CUDA device, where they take at most a quarter
    of what is free there. Otherwise they stay, and go there batch by batch. Labels always stay."""
    images = {f: t for f, t in data._asdict().items() if isinstance(t, Tensor) and t.ndim == 4}
    size = sum(t.numel() for t in images.values())
    if device.type != "cuda" or size > torch.cuda.mem_get_info(device)[0] / 4:
        return data
    return data._replace(**{f: t.to(device) for f, t in images.items()})


def to_unit(images: Tensor) -> Tensor:
    """uint8 images to float32 in [0, 1]; TypeError for others, which may be in [0, 1] already."""
    if images.dtype != torch.uint8:
        raise TypeError(f"images must be uint8, not {images.dtype}")
    return images.float() / 255


def to_input(images: Tensor) -> Tensor:
    """What a model is to explain of uint8 images (B, C, H, W), float32: grey ones (C = 1) binarised
    afresh, each pixel 1 with probability value/255, else 0; colour ones as they are, in [0, 1]."""
    x = to_unit(images)
    return x if images.shape[1] > 1 else (torch.rand(x.shape, device=x.device) < x).float()


def shuffled(images: Tensor, batch_size: int, seed: int, epoch: int) -> list[Tensor]:
    """The batches of an epoch as index tensors, the last one smaller. They depend on seed and epoch
    alone, so that a run can go on in the middle of an epoch."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = torch.randperm(len(images), generator=generator).to(images.device)
    return list(order.split(batch_size))


def in_order(images: Tensor, device: torch.device, what: str) -> Iterator[tuple[int, Tensor]]:
    """Images (N, ...) on the device, in batches of 512 of 28x28 or of as many values; on a terminal
    a bar says what for. Yields the number of a batch's first image, and the batch."""
    size = max(1, 401_408 // images[0].numel())
    for start in tqdm(range(0, len(images), size), what, leave=False, disable=None):
        yield start, images[start : start + size].to(device)
