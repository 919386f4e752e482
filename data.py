"""Data sets as uint8 tensors, and batches of them.

    digits        1,797 handwritten digits that come with scikit-learn, 28x28, no download
    mnist         60,000 + 10,000, grey 28x28
    fashionmnist  60,000 + 10,000, grey 28x28
    cifar10       50,000 + 10,000, 32x32, 10 classes
    cifar100      50,000 + 10,000, 32x32, 100 classes
    stl10         5,000 + 8,000 (and 100,000 unlabelled), resized from 96x96 to 32x32, 10 classes
    tinyimagenet  100,000 + 10,000 (its validation split), 64x64, 200 classes
    celeba        162,770 + 19,962 aligned faces, resized to 64x64, no classes
    folder        images of any size below train/ and test/, in a folder a class or without classes

All are read below a data folder in their official layout, or downloaded there. What is decoded or
resized is kept in decoded/ below the data folder, once, and read from there through a memory map.
"""

import contextlib
import ctypes
import gzip
import io
import mmap
import os
import socket
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchvision import datasets
from torchvision.datasets.utils import check_integrity, download_url
from torchvision.transforms.v2.functional import resize

from files import BLOCK, PICTURES, Files, UserError, cached, decoded


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
FASHION = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat",
    "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
SHAPES = {  # channels, height, width
    "digits": (1, 28, 28),
    "mnist": (1, 28, 28),
    "fashionmnist": (1, 28, 28),
    "cifar10": (3, 32, 32),
    "cifar100": (3, 32, 32),
    "stl10": (3, 32, 32),
    "tinyimagenet": (3, 64, 64),
    "celeba": (3, 64, 64),
    "folder": (3, 32, 32),
}
DATASETS = tuple(SHAPES)
IMAGE_FIELDS = ("train", "test", "unlabelled")  # of Data
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
) -> Data:
    """A data set on the CPU. Raises UserError with the ways to get it where it cannot be had.

    `image_size` is the side of the images of "folder" (default 32); `unlabelled` adds the 100,000
    unlabelled images of "stl10"; `threshold` makes grey images black and white, once and for all.
    """
    folder = Path(data_dir)
    if name not in SHAPES:
        raise UserError(f"unknown data set {name!r}: choose {', '.join(DATASETS)}")
    shape = image_shape(name, image_size)
    if unlabelled and name != "stl10":
        raise UserError(f"--unlabelled is for --dataset stl10: {name} has no unlabelled split")
    if threshold and shape[0] > 1:
        raise UserError(f"--threshold is for grey images: those of {name} have colours")
    if threshold:
        return thresholded(load(name, data_dir, download))
    if name == "digits":
        return _digits()
    if name == "mnist":
        return _mnist(name, "MNIST", folder, DIGITS, [], download)
    if name == "fashionmnist":
        return _mnist(name, "FashionMNIST", folder, FASHION, [DEBIAN_FASHION], download)
    if name in ("cifar10", "cifar100"):
        return _cifar(name, folder, download)
    if name == "stl10":
        return _stl10(folder, download, unlabelled)
    if name == "tinyimagenet":
        return _tinyimagenet(folder, download)
    if name == "celeba":
        return _celeba(folder, download)
    return _folder(folder, shape[1])


# --------------------------------------------------------------------------------------------------
# Downloads, and what to do where there is none

PLACES = {
    "mnist": "the four *-ubyte files (plain or .gz) into {}/MNIST/raw",
    "fashionmnist": "the four *-ubyte files (plain or .gz) into {}/FashionMNIST/raw",
    "cifar10": "cifar-10-python.tar.gz, or the folder cifar-10-batches-py in it, into {}",
    "cifar100": "cifar-100-python.tar.gz, or the folder cifar-100-python in it, into {}",
    "stl10": "stl10_binary.tar.gz, or the folder stl10_binary in it, into {}",
    "tinyimagenet": "tiny-imagenet-200.zip, or the folder tiny-imagenet-200 in it, into {}",
    "celeba": "img_align_celeba.zip (or the folder) and list_eval_partition.txt into {}/celeba",
}


def _ways(name: str, data_dir: Path) -> str:
    debian = "; or apt-get install dataset-fashion-mnist" if name == "fashionmnist" else ""
    return (
        f"Ways to get it: put {PLACES[name].format(data_dir)}; or name another folder with "
        f"--data-dir; or run where the network is{debian}; or take --dataset digits, which needs "
        "none"
    )


def _download(name: str, data_dir: Path, fetch: Callable[[], object], found: str = "") -> None:
    """Runs `fetch`, which downloads; `found` says what is there that is not enough."""
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(30)
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # each mirror tried is a line there
            fetch()
    except Exception as error:  # whatever torchvision and the network raise, the user needs a way
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(
            f"{name} could not be downloaded ({reason}). {found}{'. ' * bool(found)}"
            f"{_ways(name, data_dir)}"
        ) from None
    finally:
        socket.setdefaulttimeout(timeout)


def _absent(name: str, data_dir: Path, what: str) -> UserError:
    return UserError(f"no {name}: {what}. {_ways(name, data_dir)}")


def _whole(listed: list[tuple[Path, str]]) -> str:
    """What is missing or not as its MD5 sum says among the files of a folder; "" where all is."""
    missing = [path.name for path, _ in listed if not path.is_file()]
    damaged = [p.name for p, md5 in listed if p.is_file() and not check_integrity(str(p), md5)]
    said = [f"lacks {', '.join(missing)}"] if missing else []
    said += [f"holds damaged files ({', '.join(damaged)})"] if damaged else []
    return f"{listed[0][0].parent} {' and '.join(said)}" if said else ""


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
    name: str, base: str, data_dir: Path, classes: tuple, elsewhere: list[Path], download: bool
) -> Data:
    folders = [data_dir / base / "raw", data_dir, *elsewhere]
    folder = next((f for f in folders if not _missing(f)), None)
    if folder is None:
        if not download:
            raise _absent(name, data_dir, f"not in {', '.join(map(str, folders))}")
        folder = folders[0]
        missing = _missing(folder)
        found = f"{folder} lacks {', '.join(missing)}" if len(missing) < 4 else ""
        fetch = getattr(datasets, base)
        _download(name, data_dir, lambda: fetch(str(data_dir), download=True), found)
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


# --------------------------------------------------------------------------------------------------
# CIFAR and STL-10


def _cifar(name: str, data_dir: Path, download: bool) -> Data:
    kind = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]

    def splits() -> list[datasets.CIFAR10]:
        return [kind(str(data_dir), train=train) for train in (True, False)]

    try:
        train, test = splits()
    except (RuntimeError, OSError):  # not there, or not what its checksums say
        base = data_dir / kind.base_folder
        listed = [(kind.meta["filename"], kind.meta["md5"]), *kind.train_list, *kind.test_list]
        found = _whole([(base / file, md5) for file, md5 in listed])
        if not download:
            raise _absent(name, data_dir, found) from None
        fetch = partial(kind, str(data_dir), download=True)
        _download(name, data_dir, fetch, found if base.is_dir() else "")
        train, test = splits()
    tensors = []
    for split in (train, test):
        tensors.append(torch.from_numpy(split.data).permute(0, 3, 1, 2).contiguous())
        tensors.append(torch.tensor(split.targets))
    return Data(*tensors, tuple(train.classes))


def _stl10(data_dir: Path, download: bool, unlabelled: bool) -> Data:
    kind, base = datasets.STL10, data_dir / datasets.STL10.base_folder
    sums = dict(map(tuple, [*kind.train_list, *kind.test_list]))
    files = {"train": "train_X.bin", "test": "test_X.bin", "unlabelled": "unlabeled_X.bin"}
    if not unlabelled:
        del files["unlabelled"]
    needed = [*files.values(), "train_y.bin", "test_y.bin"]
    listed = [(base / file, sums[file]) for file in needed]
    if not all(path.is_file() for path, _ in listed):
        found = _whole(listed)
        if not download:
            raise _absent("stl10", data_dir, found)
        fetch = partial(kind, str(data_dir), split="test", download=True)
        _download("stl10", data_dir, fetch, found if base.is_dir() else "")

    def blocks(file: str) -> Iterator[np.ndarray]:
        split = file.partition("_")[0]  # train_X.bin: and its labels
        if damaged := _whole([(p, md5) for p, md5 in listed if p.name.startswith(split)]):
            raise UserError(f"stl10: {damaged}: delete them. {_ways('stl10', data_dir)}")
        columns_first = np.memmap(base / file, np.uint8, "r").reshape(-1, 3, 96, 96)
        for start in range(0, len(columns_first), BLOCK):
            rows_first = torch.from_numpy(columns_first[start : start + BLOCK].copy()).mT
            yield resize(rows_first, [32, 32], antialias=True).numpy()

    arrays = {}
    for split, file in files.items():
        stat = (base / file).stat()
        shape = (stat.st_size // (3 * 96 * 96), 3, 32, 32)
        signature = f"{stat.st_size} {stat.st_mtime_ns}"
        path = data_dir / "decoded" / f"stl10-{split}.npy"
        arrays[split] = cached(path, shape, signature, partial(blocks, file))
    labels = {}
    for split in ("train", "test"):
        labels[split] = torch.from_numpy(np.fromfile(base / f"{split}_y.bin", np.uint8)).long() - 1
        if len(labels[split]) != len(arrays[split]):
            raise UserError(
                f"stl10: {base / split}_y.bin has {len(labels[split])} labels for "
                f"{len(arrays[split])} images: delete it. {_ways('stl10', data_dir)}"
            )
    names = base / kind.class_names_file
    classes = tuple(names.read_text().split()) if names.is_file() else DIGITS
    return Data(
        arrays["train"], labels["train"], arrays["test"], labels["test"], classes,
        arrays.get("unlabelled"),
    )  # fmt: skip


# --------------------------------------------------------------------------------------------------
# Picture files: TinyImageNet, CelebA and folders of the user's own


def _tinyimagenet(data_dir: Path, download: bool) -> Data:
    base, name = "tiny-imagenet-200", "tinyimagenet"
    places = [data_dir / base, data_dir, data_dir / f"{base}.zip"]
    root = next((p for p in places if (p / "wnids.txt").is_file() or p.is_file()), None)
    if root is None and places[0].is_dir():
        raise UserError(f"{places[0]} lacks wnids.txt. {_ways(name, data_dir)}")
    if root is None:
        root = places[-1]
        if not download:
            raise _absent(name, data_dir, f"neither {places[0]} nor {root} is there")
        url, md5 = f"http://cs231n.stanford.edu/{root.name}", "90528d7ca1a48142e341f4ef8d21d0de"
        _download(name, data_dir, partial(download_url, url, str(data_dir), root.name, md5))
    files = Files(root)
    top = "" if root.is_dir() else f"{base}/"

    def wrong(what: str) -> UserError:
        return UserError(f"{root}: {what}: get it again. {_ways(name, data_dir)}")

    wnids = sorted(files.text(f"{top}wnids.txt").split())
    label_of = {wnid: label for label, wnid in enumerate(wnids)}
    train, train_labels = [], []
    for file in files.pictures(f"{top}train/"):  # train/WNID/images/WNID_7.JPEG
        wnid = file.removeprefix(f"{top}train/").partition("/")[0]
        if wnid in label_of:
            train.append(file)
            train_labels.append(label_of[wnid])
    if missing := [wnids[label] for label in sorted(set(label_of.values()) - set(train_labels))]:
        raise wrong(f"no training images of {', '.join(missing[:3])} ({len(missing)} classes)")
    # The images of all classes lie in one folder, and only this file tells which is which.
    annotated = {}
    for line in files.text(f"{top}val/val_annotations.txt").splitlines():
        file, _, rest = line.partition("\t")
        wnid = rest.partition("\t")[0]
        if wnid not in label_of:
            raise wrong(f"val_annotations.txt has a line that names no class: {line[:60]!r}")
        annotated[f"{top}val/images/{file}"] = label_of[wnid]
    test = files.pictures(f"{top}val/images/")
    if set(test) != set(annotated):
        odd = sorted(set(test) ^ set(annotated))
        raise wrong(f"val/images and val_annotations.txt differ in {odd[0]} ({len(odd)} in all)")
    test_labels = [annotated[file] for file in test]
    classes = tuple(wnids)
    if f"{top}words.txt" in files.stamps:
        words = dict(line.split("\t", 1) for line in files.text(f"{top}words.txt").splitlines()
                     if "\t" in line)  # fmt: skip
        classes = tuple(words.get(wnid, wnid).split(",")[0].strip() for wnid in wnids)
    images = [
        decoded(files, names, 64, None, data_dir / "decoded" / f"tinyimagenet-{split}.npy")
        for split, names in (("train", train), ("test", test))
    ]
    return Data(
        images[0], torch.tensor(train_labels), images[1], torch.tensor(test_labels), classes
    )


def _celeba(data_dir: Path, download: bool) -> Data:
    def find(*names: str) -> Path | None:
        folders = [data_dir / base for base in ("celeba", "celeba/Img", "celeba/Eval", ".")]
        return next((f / n for n in names for f in folders if (f / n).exists()), None)

    def parts() -> tuple[Path | None, Path | None]:
        partition = find("list_eval_partition.txt", "list_eval_partition.csv")
        return partition, find("img_align_celeba", "img_align_celeba.zip")

    partition, root = parts()
    if partition is None or root is None:
        lacking = " and ".join(
            what for what, path in (("list_eval_partition.txt", partition),
                                    ("img_align_celeba", root)) if path is None
        )  # fmt: skip
        if not download:
            raise _absent("celeba", data_dir, f"{data_dir / 'celeba'} lacks {lacking}")
        fetch = partial(datasets.CelebA, str(data_dir), download=True)
        _download("celeba", data_dir, fetch, f"{data_dir / 'celeba'} lacks {lacking}")
        partition, root = parts()
    files = Files(root)
    path_of = {name.rpartition("/")[2]: name for name in files.pictures("")}
    splits: dict[str, list[str]] = {"0": [], "1": [], "2": []}  # training, validation, test
    for line in partition.read_text().splitlines():
        name, _, split = line.replace(",", " ").partition(" ")
        if name.lower().endswith(PICTURES) and split.strip() in splits:
            splits[split.strip()].append(name)
    for split in ("0", "2"):
        if not splits[split]:
            raise UserError(f"{partition} names no images of split {split}: get it again")
        if missing := [name for name in splits[split] if name not in path_of]:
            raise UserError(
                f"{root} lacks {missing[0]} and {len(missing) - 1} more images that "
                f"{partition.name} names: unpack img_align_celeba.zip again"
            )
    images = [  # the middle 148 x 148 of 178 x 218, the face
        decoded(files, [path_of[n] for n in splits[split]], 64, 148,
                 data_dir / "decoded" / f"celeba-{split_name}.npy")
        for split, split_name in (("0", "train"), ("2", "test"))
    ]  # fmt: skip
    return Data(images[0], None, images[1], None, ())


def _folder(root: Path, side: int) -> Data:
    for split in ("train", "test"):
        if not (root / split).is_dir():
            raise UserError(
                f"{root} has no folder {split}/: --dataset folder reads images from train/ and "
                "test/ below --data-dir, in a folder a class or in none"
            )
    found = {split: Files(root / split) for split in ("train", "test")}
    names = {split: files.pictures("") for split, files in found.items()}
    for split, pictures in names.items():
        if not pictures:
            raise UserError(f"{root / split} has no images ({', '.join(PICTURES)})")
    classes = {s: [n.partition("/")[0] if "/" in n else "" for n in names[s]] for s in names}
    known = sorted(set(classes["train"]))
    if "" in known and len(known) > 1:
        raise UserError(f"{root / 'train'} has images beside the class folders: move them into one")
    labels = {}
    if len(known) > 1:  # a single class says no more than none
        if odd := sorted(set(classes["test"]) - set(known)):
            odd = f"the class {odd[0]!r}" if odd[0] else "images outside the class folders"
            raise UserError(f"{root / 'test'} has {odd}, which {root / 'train'} has not")
        index = {name: label for label, name in enumerate(known)}
        labels = {s: torch.tensor([index[name] for name in classes[s]]) for s in names}
    images = {
        split: decoded(found[split], names[split], side, None,
                        root / "decoded" / f"folder-{split}-{side}.npy")
        for split in names
    }  # fmt: skip
    return Data(images["train"], labels.get("train"), images["test"], labels.get("test"),
                tuple(known) if labels else ())  # fmt: skip


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


def keep_freed_memory() -> None:
    """Lets glibc keep what is freed, up to 1 GiB, instead of giving it back to the system page by
    page and asking for it again in the next update, which took a tenth of the time on a CPU."""
    mmap_threshold, trim_threshold = -3, -1  # of malloc.h
    with contextlib.suppress(OSError, AttributeError):  # another C library has no mallopt
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(mmap_threshold, 32 << 20)
        mallopt(trim_threshold, 1 << 30)


def place(data: Data, device: torch.device, mode: str = "auto") -> Data:
    """The data with its images in the device's memory ("on"), where they are ("off"), or in the
    device's memory where they take at most a quarter of what is free there ("auto").

    Images that stay behind, in memory or in a file's map, go to the device batch by batch. On the
    CPU "on" reads maps into memory and "auto" is "off". Labels stay on the CPU.
    """
    images = {k: v for k, v in data._asdict().items() if v is not None and k in IMAGE_FIELDS}
    if mode == "auto" and device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        mode = "on" if sum(t.numel() for t in images.values()) <= free / 4 else "off"
    if mode != "on":
        return data
    return data._replace(**{k: v.to(device, copy=True) for k, v in images.items()})


def first_images(data: Data, n: int | None) -> Data:
    """The data with the first `n` training images (and unlabelled ones) only, all where None."""
    if n is None:
        return data
    if n > len(data.to_train_on):
        raise UserError(f"--train-images {n}: there are {len(data.to_train_on):,}")

    def first(images: Tensor | None) -> Tensor | None:
        if images is None:
            return None
        part = images[:n]
        if hasattr(images, "pages"):
            part.pages = images.pages  # for `take`
        return part

    labels = None if data.train_labels is None else data.train_labels[:n]
    return data._replace(
        train=first(data.train), train_labels=labels, unlabelled=first(data.unlabelled)
    )


def thresholded(data: Data) -> Data:
    """The data with its grey images in black and white, 255 where a pixel is above 127, else 0: a
    binarisation that leaves no noise to explain."""
    images = {k: v for k, v in data._asdict().items() if v is not None and k in IMAGE_FIELDS}
    return data._replace(**{k: (v > 127).to(torch.uint8) * 255 for k, v in images.items()})


# --------------------------------------------------------------------------------------------------
# Batches


def to_unit(images: Tensor) -> Tensor:
    """uint8 images to float32 in [0, 1]."""
    return images.float() / 255


def binarize(images: Tensor) -> Tensor:
    """A fresh binary image, float32 0 or 1, each pixel 1 with probability value/255."""
    noise = torch.rand(images.shape, device=images.device)
    return (noise < to_unit(images)).float()


def observed(images: Tensor) -> Tensor:
    """What a model is to explain of uint8 images (B, C, H, W), float32 in [0, 1].

    Grey images (C = 1) are binarised afresh, colour images keep their 8-bit values.
    """
    return binarize(images) if images.shape[1] == 1 else to_unit(images)


def shuffled(images: Tensor, batch_size: int, seed: int, epoch: int) -> list[Tensor]:
    """The batches of an epoch as index tensors, the last one smaller.

    A function of seed and epoch alone, so that a run can go on in the middle of an epoch.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = torch.randperm(len(images), generator=generator).to(images.device)
    return list(order.split(batch_size))


def take(images: Tensor, rows: Tensor | slice, device: torch.device) -> Tensor:
    """A batch of the images on the device.

    What it read of a memory map does not stay in the process's memory: a run on a file of any size
    needs no more than its batches, and the system keeps of the file what it has room for.
    """
    batch = images[rows]
    if hasattr(images, "pages") and hasattr(mmap, "MADV_DONTNEED"):
        images.pages.madvise(mmap.MADV_DONTNEED)
    return batch.to(device)


def in_order(
    images: Tensor, device: torch.device, pixels: int = 512 * 28 * 28, first: int = 0, of: int = 1
) -> Iterator[tuple[int, Tensor]]:
    """Images (N, ...) on the device, in batches of about so many values: 512 of 28x28. Yields the
    number of a batch's first image, and the batch. Every batch once, or from number `first` on
    every `of`-th."""
    size = max(1, pixels // images[0].numel())
    for start in range(first * size, len(images), of * size):
        yield start, take(images, slice(start, start + size), device)
