"""Small image data sets, held in memory as tensors.

`load` is the entrance. The IDX files of MNIST and Fashion-MNIST are searched for on this machine
first and downloaded only when they are nowhere to be found.
"""

from __future__ import annotations

import gzip
import hashlib
import math
import os
import struct
import urllib.error
import urllib.request
import zlib
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sparsetrain.config import did_you_mean

_IDX_FILES = {
    "train_x": "train-images-idx3-ubyte",
    "train_y": "train-labels-idx1-ubyte",
    "test_x": "t10k-images-idx3-ubyte",
    "test_y": "t10k-labels-idx1-ubyte",
}


@dataclass(frozen=True)
class _IdxHome:
    """Where an IDX data set is published, and what its four files hash to (MD5, by role)."""

    url: str
    md5: dict[str, str]
    system_folder: Path | None = None


_IDX_HOMES = {
    "mnist": _IdxHome(
        url="https://ossci-datasets.s3.amazonaws.com/mnist/",
        md5={
            "train_x": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
            "train_y": "d53e105ee54ea40749a09fcbcd1e9432",
            "test_x": "9fb629c4189551a2d022fa330f9573f3",
            "test_y": "ec29112dd5afa0611ce80d1b7f02629c",
        },
    ),
    "fashion_mnist": _IdxHome(
        url="http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        md5={
            "train_x": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
            "train_y": "25c81989df183df01b3e8a0aad5dffbe",
            "test_x": "bef4ecab320f06d8554ea6380940ec79",
            "test_y": "bb300cfdad3c16e7a12a480ee83cd310",
        },
        # Installed by the Debian and Ubuntu package `dataset-fashion-mnist`.
        system_folder=Path("/usr/share/datasets/fashion-mnist"),
    ),
}

DATASETS = ("digits", *_IDX_HOMES)


@dataclass(frozen=True)
class Dataset:
    """A classification data set in memory.

    Images are float32 of shape [samples, channels, height, width]; labels are int64 of shape
    [samples] with values below `classes`.
    """

    name: str
    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    classes: int

    @property
    def in_shape(self) -> tuple[int, ...]:
        """Shape of one sample: (channels, height, width)."""
        return tuple(self.train_x.shape[1:])

    def subset(self, train: int, test: int, *, seed: int | None = None) -> Dataset:
        """The first `train` and `test` samples, or a random choice of them when `seed` is given."""
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        train_index = _choose(len(self.train_x), train, generator, "train")
        test_index = _choose(len(self.test_x), test, generator, "test")
        return replace(
            self,
            train_x=self.train_x[train_index],
            train_y=self.train_y[train_index],
            test_x=self.test_x[test_index],
            test_y=self.test_y[test_index],
        )

    def to(self, device: torch.device | str) -> Dataset:
        """The same data on another device."""
        return replace(
            self,
            train_x=self.train_x.to(device),
            train_y=self.train_y.to(device),
            test_x=self.test_x.to(device),
            test_y=self.test_y.to(device),
        )


def load(name: str, *, root: Path | str | None = None, normalise: bool = True) -> Dataset:
    """Load a data set by name: "digits", "fashion_mnist" or "mnist".

    `digits` (1,797 images of 8 x 8 pixels) comes with scikit-learn and is split once and for all
    into 1,437 training and 360 test images, stratified by class. The others are 60,000 training
    and 10,000 test images of 28 x 28 pixels, read from IDX files in `root`, in the folder named by
    the environment variable SPARSETRAIN_DATA (or its subfolder `name`), in ~/.cache/sparsetrain,
    or where a Linux package puts them, and downloaded into the cache otherwise.

    Pixels are scaled to [0, 1]; with `normalise` the mean and standard deviation of the training
    pixels (two scalars) are then taken out. Raises ValueError for an unknown name, and when the
    files can be neither found, nor downloaded, nor read.
    """
    if name not in DATASETS:
        hint = did_you_mean(name, DATASETS)
        raise ValueError(f"unknown data set {name!r}: choose one of {', '.join(DATASETS)}{hint}")
    if name == "digits":
        dataset = _digits()
    else:
        dataset = _from_idx(name, None if root is None else Path(root))
    return _normalised(dataset) if normalise else dataset


def read_idx(path: Path) -> Tensor:
    """Read one IDX file of unsigned bytes, gzipped or plain, as a uint8 tensor of its shape.

    Raises ValueError naming the file when it is not such a file or is cut short.
    """
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} cannot be read ({error}): fetch the file again") from error
    if len(content) < 4 or content[:3] != b"\x00\x00\x08":
        raise ValueError(f"{path} is not an IDX file of unsigned bytes: fetch the file again")
    dimensions = content[3]
    start = 4 + 4 * dimensions
    if len(content) < start:
        raise ValueError(f"{path} is cut short inside its header: fetch the file again")
    shape = struct.unpack(f">{dimensions}I", content[4:start])
    if len(content) - start != math.prod(shape):
        raise ValueError(
            f"{path} should hold {math.prod(shape)} values for its shape {shape} but holds "
            f"{len(content) - start}: fetch the file again"
        )
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=start).copy()).view(shape)


def _choose(available: int, wanted: int, generator: torch.Generator | None, part: str) -> Tensor:
    if not 0 < wanted <= available:
        raise ValueError(f"{part}={wanted} is outside 1..{available}, the samples there are")
    if generator is None:
        return torch.arange(wanted)
    return torch.randperm(available, generator=generator)[:wanted]


def _normalised(dataset: Dataset) -> Dataset:
    mean, std = dataset.train_x.mean(), dataset.train_x.std()
    return replace(
        dataset, train_x=(dataset.train_x - mean) / std, test_x=(dataset.test_x - mean) / std
    )


def _digits() -> Dataset:
    try:
        datasets = import_module("sklearn.datasets")
        selection = import_module("sklearn.model_selection")
    except ImportError as error:
        raise ValueError(
            "the digits come with scikit-learn: install it with pip install 'sparsetrain[demo]'"
        ) from error
    images, labels = datasets.load_digits(return_X_y=True)
    images = (images.astype(np.float32) / 16.0).reshape(-1, 1, 8, 8)
    train_x, test_x, train_y, test_y = selection.train_test_split(
        images, labels.astype(np.int64), test_size=360, random_state=0, stratify=labels
    )
    return Dataset(
        name="digits",
        train_x=torch.from_numpy(train_x),
        train_y=torch.from_numpy(train_y),
        test_x=torch.from_numpy(test_x),
        test_y=torch.from_numpy(test_y),
        classes=10,
    )


def _from_idx(name: str, root: Path | None) -> Dataset:
    parts = {role: read_idx(path) for role, path in _find_idx(name, root).items()}
    return Dataset(
        name=name,
        train_x=parts["train_x"].unsqueeze(1).float() / 255.0,
        train_y=parts["train_y"].long(),
        test_x=parts["test_x"].unsqueeze(1).float() / 255.0,
        test_y=parts["test_y"].long(),
        classes=10,
    )


def _cache_folder(name: str) -> Path:
    return Path.home() / ".cache" / "sparsetrain" / name


def _search_folders(name: str, root: Path | None) -> list[Path]:
    bases = [] if root is None else [root]
    if environment := os.environ.get("SPARSETRAIN_DATA"):
        bases.append(Path(environment))
    folders = [folder for base in bases for folder in (base, base / name)]
    folders.append(_cache_folder(name))
    if system := _IDX_HOMES[name].system_folder:
        folders.append(system)
    return folders


def _find_idx(name: str, root: Path | None) -> dict[str, Path]:
    for folder in _search_folders(name, root):
        found = {role: _idx_file(folder, stem) for role, stem in _IDX_FILES.items()}
        paths = {role: path for role, path in found.items() if path is not None}
        if len(paths) == len(_IDX_FILES):
            return paths
    return _download(name)


def _idx_file(folder: Path, stem: str) -> Path | None:
    for path in (folder / f"{stem}.gz", folder / stem):
        if path.is_file():
            return path
    return None


def _download(name: str) -> dict[str, Path]:
    home, folder = _IDX_HOMES[name], _cache_folder(name)
    print(f"{name} is not on this machine: downloading it from {home.url} to {folder}")
    paths = {}
    for role, stem in _IDX_FILES.items():
        url = f"{home.url}{stem}.gz"
        try:
            with urllib.request.urlopen(url, timeout=60) as response:
                content = response.read()
        except (urllib.error.URLError, OSError) as error:
            raise ValueError(
                f"{url} cannot be downloaded ({error}): put the four files "
                f"{', '.join(f'{stem}.gz' for stem in _IDX_FILES.values())} into {folder}, or into "
                "a folder that the environment variable SPARSETRAIN_DATA names"
            ) from error
        digest = hashlib.md5(content, usedforsecurity=False).hexdigest()
        if digest != home.md5[role]:
            raise ValueError(
                f"{url} gave a file with MD5 {digest} where {home.md5[role]} is published: "
                "try again, or fetch the file by hand"
            )
        folder.mkdir(parents=True, exist_ok=True)
        paths[role] = folder / f"{stem}.gz"
        paths[role].write_bytes(content)
    return paths
