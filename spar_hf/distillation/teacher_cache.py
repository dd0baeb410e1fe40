"""Feature maps of the teacher on disk: `cache_teacher.py` writes them, and distillation reads them instead of running it."""

import hashlib
import json
import os
import struct
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from spar_hf import SparImageProcessorPil, SparVisionModel
from spar_hf.data.augmentation import Crop, Views
from spar_hf.model.fingerprints import vision_fingerprint
from spar_hf.model.image_input import read_rgb, set_pixel_limit
from spar_hf.utils.errors import MissingFiles, UsageError
from spar_hf.utils.folders import Folder
from spar_hf.utils.options import with_current_names
from spar_hf.utils.remote_files import is_remote, read_remote

MANIFEST = "manifest.json"
COMMAND = "training/cache_teacher.py"
MEND_SHARD = f"Run the same command of {COMMAND} again: it makes only this shard anew."


# of an image processor: what decides the pixels of a view, beside mean and standard deviation
PIXEL_SETTINGS = ("do_rescale", "rescale_factor", "do_normalize", "max_tokens", "patch_size")


def pixel_settings(image_processor: SparImageProcessorPil) -> dict[str, Any]:
    """
    The settings that decide the pixels of a view. A manifest states those that are not the default.

    Example:

    ```python
    >>> pixel_settings(SparImageProcessorPil(do_normalize=False))["do_normalize"]
    False
    ```"""
    return {name: getattr(image_processor, name) for name in PIXEL_SETTINGS}


def sha256(data: bytes) -> str:
    """Checksum of bytes."""
    return hashlib.sha256(data).hexdigest()


def read_source(source: str) -> bytes:
    """
    The bytes of an image, of a path or the URL of a store.

    Raises:
        OSError: it is not there, or cannot be read.
    """
    return read_remote(source) if is_remote(source) else Path(source).read_bytes()


def source_name(source: str, folder: Folder) -> str:
    """How a cache names an image: by its URL, by its path from the cache, or the whole path if the cache is in a store."""
    if is_remote(source):
        return source
    path = Path(source).resolve()
    return str(path) if folder.is_remote else os.path.relpath(path, Path(folder.url).resolve())


class TeacherCache:
    """
    The maps of a finished cache, in a fixed order.

    `cache[i]` is `(pixel_values, target)`: the stored view of an image, `(1, 3, height, width)`, and the feature map that
    [`SlidingWindowTeacher`] made of it, `(1, dim, height / patch, width / patch)` float32. The checksum of a shard is
    compared when it is first read, that of an image whenever it is read. Of a cache in a store no shard is read as a whole:
    a map is fetched by itself, and its own checksum compared. Workers of a `DataLoader` can receive a cache.

    Raises:
        UsageError: a damaged shard, or an image that changed.
        MissingFiles: a shard or image that is gone.
    """

    def __init__(self, folder: str | Path, manifest: dict[str, Any]):
        self.files = Folder(folder)
        self.folder = self.files.url if self.files.is_remote else Path(folder)
        self.setting, self.shards = manifest["setting"], manifest["shards"]
        self.positions = [(s, row) for s, shard in enumerate(self.shards) for row in range(len(shard["maps"]))]
        self.checked: set[int] = set()
        self.headers: dict[str, tuple[int, dict[str, Any]]] = {}  # of shards in a store: where maps begin, and which
        pixels = {name: self.setting[name] for name in PIXEL_SETTINGS if name in self.setting}
        self.image_processor = SparImageProcessorPil(
            image_mean=self.setting["image_mean"], image_std=self.setting["image_std"], **pixels
        )

    @classmethod
    def open(
        cls, folder: str | Path, *, model: SparVisionModel, window_size: int | None = None, stride: int | None = None
    ) -> "TeacherCache":
        """
        Open a cache for a teacher.

        Args:
            folder: that `cache_teacher.py` wrote, or its URL in a store.
            model: encoder of the teacher.
            window_size, stride: of its windows in pixels; compared if they are given.

        Raises:
            MissingFiles: no cache there.
            UsageError: an unfinished cache, or one made with another model, window or stride.
        """
        manifest = read_manifest(folder)
        asked = {"model": vision_fingerprint(model), "window_size": window_size, "stride": stride}
        check_setting(folder, manifest["setting"], {name: value for name, value in asked.items() if value is not None})
        if not manifest["complete"]:
            raise UsageError(
                f"The teacher cache {folder} is not finished. Run the same command of {COMMAND} again: it goes on where it "
                "stopped."
            )
        return cls(folder, manifest)

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.pixel_values(index), self.target(index)

    @property
    def different_images(self) -> int:
        """How many images the maps were made from: fewer than maps, if images have several views."""
        return len({self.image(i) for i in range(len(self))})

    def image(self, index: int) -> Path | str:
        """The file that a map was made from, or its URL in a store."""
        shard, row = self.positions[index]
        name = self.shards[shard]["maps"][row]["image"]
        return name if is_remote(name) else Path(os.path.normpath(Path(self.folder).resolve() / name))

    def pixel_values(self, index: int) -> torch.Tensor:
        """The stored view of an image: `(1, 3, height, width)`."""
        shard, row = self.positions[index]
        entry, source = self.shards[shard]["maps"][row], self.image(index)
        mend = f"Put it back, or make the cache again with {COMMAND}."
        try:
            data = read_source(str(source))
        except FileNotFoundError as error:
            raise MissingFiles(f"The teacher cache {self.folder} needs {source}, which is gone. {mend}") from error
        if len(data) != entry["bytes"] or sha256(data) != entry["sha256"]:
            raise UsageError(f"{source} is not the image that {self.folder} was made from. {mend}")
        set_pixel_limit(self.setting.get("max_pixels"))
        view = Crop(**entry["crop"]).apply(read_rgb(data, self.setting.get("image_range"), urls=False))
        return self.image_processor(view, do_resize=False, return_tensors="pt")["pixel_values"]

    def target(self, index: int) -> torch.Tensor:
        """The teacher's map: `(1, dim, height / patch, width / patch)` float32."""
        shard, row = self.positions[index]
        record = self.shards[shard]
        if self.files.is_remote:
            return self._fetch(record, row)[None].float()
        if shard not in self.checked:
            check_shard(self.files, record)
            self.checked.add(shard)
        with safe_open(self.files.path(record["file"]), framework="pt") as file:
            return file.get_tensor(str(row))[None].float()

    def _fetch(self, record: dict[str, Any], row: int) -> torch.Tensor:
        """A map of a shard in a store."""
        name = record["file"]
        try:
            if name not in self.headers:
                (length,) = struct.unpack("<Q", self.files.read(name, 0, 8))  # the layout of safetensors
                self.headers[name] = (8 + length, json.loads(self.files.read(name, 8, 8 + length)))
            start, header = self.headers[name]
            entry = header[str(row)]
            data = self.files.read(name, *(start + offset for offset in entry["data_offsets"]))
        except FileNotFoundError as error:
            raise MissingFiles(f"The shard {name} of {self.folder} is gone. {MEND_SHARD}") from error
        except (ValueError, KeyError, struct.error) as error:
            raise UsageError(f"The shard {name} of {self.folder} is damaged: {error}. {MEND_SHARD}") from error
        sums = record.get("map_sha256")  # which caches of earlier versions, made on a disk, have not
        if sums is not None and sha256(data) != sums[row]:
            raise UsageError(f"The shard {name} of {self.folder} is damaged: a checksum differs. {MEND_SHARD}")
        return torch.frombuffer(bytearray(data), dtype=torch.bfloat16).view(entry["shape"])


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """
    The manifest of a cache, finished or not; its setting under the names of today.

    Raises:
        MissingFiles: there is none.
        UsageError: it is damaged.
    """
    try:
        manifest = json.loads(Folder(folder).read(MANIFEST))
        return manifest | {"setting": with_current_names(manifest["setting"], [Views])}
    except FileNotFoundError as error:
        raise MissingFiles(f"{folder} holds no {MANIFEST}. Make a cache with {COMMAND} --output {folder}.") from error
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError) as error:
        raise UsageError(
            f"{folder}/{MANIFEST} is damaged. Delete it and run the same command of {COMMAND} again, which keeps finished "
            "shards."
        ) from error


def check_setting(folder: str | Path, found: dict[str, Any], asked: dict[str, Any]) -> None:
    """
    Compare the setting that a cache was made with to the one asked for.

    Raises:
        UsageError: they differ; the message names every difference.
    """
    differences = [
        "images differ" if name == "photos" else f"{name} is {found.get(name)!r} there and {value!r} here"
        for name, value in asked.items()
        if found.get(name) != value
    ]
    if differences:
        raise UsageError(
            f"The teacher cache {folder} was made with another setting: {'; '.join(differences)}. Use the setting of "
            f"the cache, or write one with the new setting to another folder with {COMMAND}."
        )


def check_shard(folder: Folder, record: dict[str, Any]) -> None:
    """
    Compare a shard's checksum with its record.

    Raises:
        MissingFiles: there is no such shard.
        UsageError: it is damaged.
    """
    path = folder.path(record["file"])
    try:
        with folder.open(record["file"]) as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError as error:
        raise MissingFiles(f"The shard {path} is gone. {MEND_SHARD}") from error
    if found != record["sha256"]:
        raise UsageError(f"The shard {path} is damaged: its checksum is not the one in the manifest. {MEND_SHARD}")
