"""Weights on disk or on the Hub, read tensor by tensor; nothing in them is ever run.

A checkpoint is a folder with `config.json` as transformers and timm write it, or a single file: safetensors, PyTorch's,
or Google's `.npz`.
"""

import argparse
import json
import math
import os
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor


PYTORCH_SUFFIXES = (".pth", ".pt", ".bin", ".tar", ".ckpt")
# Where training codes keep the weights in a file with other things.
ENVELOPES = ("model", "state_dict", "model_state_dict")
CONFIG = "config.json"
PREPROCESSOR = "preprocessor_config.json"
# In the order of preference; each may come with an index of its parts.
WEIGHTS = (
    "model.safetensors",
    "pytorch_model.bin",
)
# More than any model has, and few enough to be looked at one by one.
MAX_BLOCKS = 1000


@dataclass(frozen=True)
class Checkpoint:
    """What a source holds.

    Attributes:
        tensors: Read when they are asked for; their `shapes` are known without reading them.
        config: The contents of `config.json`; empty of a single file.
        preprocessor: The contents of `preprocessor_config.json`; empty where there is none.
    """

    tensors: "_Tensors"
    config: dict = field(default_factory=dict)
    preprocessor: dict = field(default_factory=dict)


def open_checkpoint(source: str | os.PathLike, revision: str = "main") -> Checkpoint:
    """A file, a folder, or `user/name` on the Hub.

    Raises:
        ValueError: in one line, if it is none of them, is cut off, or would have to run code to be read.
    """
    path = Path(source)
    if not path.exists():
        path = _download(str(source), revision)
    if path.is_file() and path.name in WEIGHTS and (path.parent / CONFIG).is_file():
        path = path.parent
    if path.is_file():
        return Checkpoint(_open_file(path))
    return Checkpoint(_open_folder(path), _read_json(path / CONFIG), _read_json(path / PREPROCESSOR))


def _download(name: str, revision: str) -> Path:
    wanted = [CONFIG, PREPROCESSOR, *WEIGHTS, "*.safetensors.index.json", "*.bin.index.json", "model-*.safetensors"]
    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=[*wanted, "pytorch_model-*.bin"]))
    except HFValidationError:
        raise ValueError(f"there is no file or folder {name!r}") from None
    except (HfHubHTTPError, OSError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"there is no file or folder {name!r}, and on the Hub it does not open ({reason})") from error
    if not folder.is_dir():
        raise ValueError(f"{name!r} holds no weights, such as {WEIGHTS[0]}")
    return folder


def _read_json(file: Path) -> dict:
    if not file.exists():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ValueError(f"cannot read {str(file)!r}: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{str(file)!r} holds no object of fields")
    return content


def _open_folder(folder: Path) -> "_Tensors":
    """The file with the weights, or its parts as an index names them."""
    for name in WEIGHTS:
        if (folder / name).exists():
            return _open_file(folder / name)
        index = folder / f"{name}.index.json"
        if index.exists():
            return _open_parts(index)
    files = sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".npz", *PYTORCH_SUFFIXES))
    if len(files) == 1:
        return _open_file(files[0])
    count = f"{len(files)} files of weights: name one of them" if files else f"no weights, such as {WEIGHTS[0]}"
    raise ValueError(f"folder {str(folder)!r} holds {count}")


def _open_parts(index: Path) -> "_Tensors":
    places = _read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(file, str) for file in places.values()):
        raise ValueError(f"{str(index)!r} has no weight_map")
    parts = {}
    for file in sorted(set(places.values())):
        if Path(file).name != file or not (index.parent / file).is_file():
            raise ValueError(f"{str(index)!r} names {file!r}, which is not there")
        parts[file] = _open_file(index.parent / file)
    absent = next((name for name, file in places.items() if name not in parts[file].shapes), None)
    if absent is not None:
        raise ValueError(f"{str(index)!r} says that {absent!r} is in {places[absent]!r}, which it is not")
    return _Joined({name: parts[file] for name, file in places.items()})


def _open_file(path: Path) -> "_Tensors":
    with path.open("rb") as file:
        start = file.read(9)
    if not start:
        raise ValueError(f"{str(path)!r} is empty")
    # A header of safetensors begins with its length, which may look like the first bytes of any other format.
    is_safetensors, is_zip = start.endswith(b"{"), start.startswith(b"PK")
    try:
        if is_zip and not is_safetensors and _is_npz(path):
            return _Npz(path)
        if not is_safetensors and (is_zip or start.startswith(b"\x80")):
            return _PyTorch(path)
        return _Safetensors(path)
    except (EOFError, OSError, RuntimeError, SafetensorError, ValueError, zipfile.BadZipFile) as error:
        if isinstance(error, UnsafeError):
            raise
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"{str(path)!r} is no whole file of weights (safetensors, PyTorch or .npz): {reason}"
        ) from error


class UnsafeError(ValueError):
    """A file holds objects that could run code."""


def _is_npz(path: Path) -> bool:
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    return bool(names) and all(name.endswith(".npy") for name in names)


class _Tensors(Mapping[str, Tensor]):
    """Named tensors with shapes that are known beforehand, and the attention heads where the format tells them."""

    shapes: dict[str, tuple[int, ...]]
    num_attention_heads: int | None = None

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


class _Safetensors(_Tensors):
    def __init__(self, path: Path):
        self.file = safe_open(path, "pt")
        self.shapes = {name: tuple(self.file.get_slice(name).get_shape()) for name in self.file.keys()}  # noqa: SIM118

    def __getitem__(self, name: str) -> Tensor:
        return self.file.get_tensor(name)


class _PyTorch(_Tensors):
    """Pages of the file are mapped, where its format lets them."""

    def __init__(self, path: Path):
        # A bag of values without methods, which DeiT's and MAE's codes save beside the weights.
        with torch.serialization.safe_globals([argparse.Namespace]):
            try:
                content = self._load(path)
            except Exception as error:  # of pickles that are cut off or no pickles, of every kind
                text = str(error)
                if "weights_only" in text.lower() or "Unsupported" in text:
                    raise UnsafeError(
                        f"{str(path)!r} holds more than tensors, which could run code when it is read: save its "
                        "weights alone, as safetensors, where you trust it"
                    ) from error
                raise ValueError(text) from error
        for envelope in ENVELOPES:
            if isinstance(content, dict) and isinstance(content.get(envelope), dict):
                content = content[envelope]
        if not isinstance(content, dict) or not any(isinstance(each, Tensor) for each in content.values()):
            raise ValueError("no tensors are in it by their names")
        self.content = {str(name): each.detach() for name, each in content.items() if isinstance(each, Tensor)}
        self.shapes = {name: tuple(each.shape) for name, each in self.content.items()}

    @staticmethod
    def _load(path: Path):
        with suppress(RuntimeError):  # files of before PyTorch 1.6 cannot be mapped
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return torch.load(path, map_location="cpu", weights_only=True)

    def __getitem__(self, name: str) -> Tensor:
        return self.content[name]


class _Npz(_Tensors):
    """Google's files: names with dots for slashes, tensors in torch's order of dimensions.

    Kernels are (in, out), of images (H, W, in, out); heads have a dimension of their own; a stack of blocks has their
    number first. bfloat16, which numpy does not know, comes as two raw bytes.
    """

    def __init__(self, path: Path):
        self.archive, self.places, self.shapes = np.load(path, allow_pickle=False), {}, {}
        with zipfile.ZipFile(path) as archive:
            for file in archive.namelist():
                self._add(file.removesuffix(".npy"), _read_header(archive, file))

    def _add(self, key: str, stored: tuple[int, ...]) -> None:
        name = key
        for prefix in ("opt/target/", "params/", "img/"):
            name = name.removeprefix(prefix)
        if "/" in name and name.split("/")[0] in ("opt", "state"):
            return  # the optimizer's
        parts = name.split("/")
        if parts[-1] in ("kernel", "scale"):
            parts[-1] = "weight"
        name = ".".join(parts)
        if name.endswith("Attention_0.query.weight") or name.endswith("Attention_1.query.weight"):
            self.num_attention_heads = stored[-2]
        if ".encoderblock." in name:
            if not stored or stored[0] > MAX_BLOCKS:
                raise ValueError(f"{key!r} of shape {stored} is no stack of blocks")
            for block in range(stored[0]):
                self._place(name.replace(".encoderblock.", f".encoderblock_{block}."), key, block, stored[1:])
        else:
            self._place(name, key, None, stored)

    def _place(self, name: str, key: str, block: int | None, stored: tuple[int, ...]) -> None:
        self.places[name] = key, block
        self.shapes[name] = tuple(_to_torch(name, torch.empty(stored, device="meta")).shape)

    def __getitem__(self, name: str) -> Tensor:
        key, block = self.places[name]
        array = self.archive[key]
        array = array if block is None else array[block]
        if array.dtype.kind == "V" and array.dtype.itemsize == 2:
            tensor = torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        else:
            tensor = torch.from_numpy(np.ascontiguousarray(array))
        return _to_torch(name, tensor)


def _read_header(archive: zipfile.ZipFile, name: str) -> tuple[int, ...]:
    with archive.open(name) as file:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(file)
        size = archive.getinfo(name).file_size - file.tell()
    if dtype.hasobject:
        raise UnsafeError(f"{name!r} holds Python objects, which could run code when they are read")
    if math.prod(shape) * dtype.itemsize != size:
        raise ValueError(f"{name!r} holds {size:,} bytes, which are no array of shape {shape}")
    return shape


def _to_torch(name: str, tensor: Tensor) -> Tensor:
    """From flax's order of dimensions."""
    *_, module, kind = ["", *name.split(".")]
    is_attention = module in ("query", "key", "value", "out")
    if kind == "bias" and is_attention:
        return tensor.flatten()
    if kind != "weight" or tensor.ndim < 2:
        return tensor
    if module == "embedding":
        return tensor.permute(3, 2, 0, 1)
    if tensor.ndim == 3:
        tensor = tensor.flatten(0, 1) if module == "out" else tensor.flatten(1)
    return tensor.T


class _Joined(_Tensors):
    """Of several files, each tensor of the one where its index says that it is."""

    def __init__(self, places: dict[str, _Tensors]):
        self.places = places
        self.shapes = {name: part.shapes[name] for name, part in places.items()}

    def __getitem__(self, name: str) -> Tensor:
        return self.places[name][name]
