"""Teacher maps on disk: what `cache_teacher.py` writes and distillation reads instead of running the teacher."""

import hashlib
import json
import os
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import safe_open

from spar_hf import SparImageProcessorPil, SparVisionModel
from spar_hf.data.segmentation_sets import jitter_image, read_image
from spar_hf.utils.fingerprint import fingerprint

MANIFEST = "manifest.json"
AGAIN = "Make the cache again with training/cache_teacher.py"


def sha256(path: Path) -> str:
    """Checksum of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


@dataclass
class Crop:
    """
    What an augmentation did to an image: `box` (left, top, right, bottom, in pixels of the image, fractions allowed)
    resized to `size` (width, height), then perhaps flipped left to right, then perhaps its light changed
    ([`jitter_image`] with the seed `jitter`).
    """

    size: tuple[int, int]
    box: tuple[float, float, float, float]
    flip: bool
    jitter: int | None = None

    @classmethod
    def draw(cls, augment, image_size: tuple[int, int], *args: Any) -> "Crop":
        """
        What `augment(image, *args)` would do to an image of this size (width, height): a stand-in for the image writes
        down what is asked of it, so that the recipe stands in one place.
        """
        stand_in = StandIn(image_size)
        augment(stand_in, *args)
        if stand_in.crop is None:
            raise TypeError("The augmentation did not resize the image, so there is no crop to pin.")
        return stand_in.crop

    def __call__(self, image: Image.Image) -> Image.Image:
        image = image.resize(tuple(self.size), Image.Resampling.BICUBIC, box=tuple(self.box))
        if self.flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return image if self.jitter is None else jitter_image(image, self.jitter)


class StandIn:
    """An image without pixels that remembers one `resize` and flips; whatever else is asked of it is an error."""

    def __init__(self, size: tuple[int, int]):
        self.size, (self.width, self.height) = size, size
        self.crop: Crop | None = None

    def resize(self, size: tuple[int, int], resample: int, box: tuple[float, float, float, float]) -> "StandIn":
        if self.crop is not None or resample != Image.Resampling.BICUBIC:
            raise TypeError("A pinned crop is one bicubic resize of a box.")
        self.crop = Crop(tuple(size), tuple(box), False)
        return self

    def transpose(self, method: int) -> "StandIn":
        if self.crop is None or method != Image.Transpose.FLIP_LEFT_RIGHT:
            raise TypeError("A pinned crop is flipped left to right after its resize, if at all.")
        self.crop.flip = not self.crop.flip
        return self


def check_setting(folder: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """
    Compare what a cache was made with to what is asked for.

    Raises:
        ValueError: they differ; names every difference.
    """
    differences = [
        f"{name} is {found.get(name)!r} there and {value!r} here" if name != "photos" else "photos differ"
        for name, value in wanted.items()
        if found.get(name) != value
    ]
    if differences:
        raise ValueError(
            f"The teacher cache {folder} was made with another setting: {'; '.join(differences)}. Use the setting of "
            "the cache, or write one with the new setting to another folder with training/cache_teacher.py."
        )


def read_manifest(folder: Path) -> dict[str, Any]:
    """
    The manifest of a cache, finished or not.

    Raises:
        FileNotFoundError: there is none.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no {MANIFEST}. {AGAIN} --output {folder}.")
    return json.loads(path.read_text(encoding="utf-8"))


class TeacherCache:
    """
    The maps of a finished cache, in a fixed order.

    `cache[i]` is `(pixel_values, target)`: the image with its pinned crop, `(1, 3, height, width)`, and what
    [`SlidingWindowTeacher`] made of it, `(1, dim, height / patch, width / patch)` float32. Every shard's checksum is
    compared when it is first read, every image's when it is read. Can be handed to the workers of a `DataLoader`.

    Raises:
        ValueError: a damaged shard, or an image that changed.
        FileNotFoundError: a shard or image that is gone.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any]):
        self.folder, self.setting, self.shards = folder, manifest["setting"], manifest["shards"]
        self.places = [(s, row) for s, shard in enumerate(self.shards) for row in range(len(shard["maps"]))]
        self.checked: set[int] = set()
        self.image_processor = SparImageProcessorPil(
            image_mean=self.setting["image_mean"], image_std=self.setting["image_std"]
        )

    @classmethod
    def open(
        cls, folder: str | Path, *, model: SparVisionModel, window_size: int | None = None, stride: int | None = None
    ) -> "TeacherCache":
        """
        Open a cache for a teacher; `window_size` and `stride` are compared where they are given.

        Raises:
            FileNotFoundError: no cache there.
            ValueError: an unfinished cache, or one made with another model, window or stride.
        """
        folder = Path(folder)
        manifest = read_manifest(folder)
        wanted = {"model": fingerprint(model), "window_size": window_size, "stride": stride}
        check_setting(folder, manifest["setting"], {name: value for name, value in wanted.items() if value is not None})
        if not manifest["complete"]:
            raise ValueError(
                f"The teacher cache {folder} is not finished. Run the same command of training/cache_teacher.py "
                "again: it goes on where it stopped."
            )
        return cls(folder, manifest)

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.pixel_values(index), self.target(index)

    def image(self, index: int) -> Path:
        """The file that a map was made from."""
        shard, row = self.places[index]
        return Path(os.path.normpath(self.folder / self.shards[shard]["maps"][row]["image"]))

    def pixel_values(self, index: int) -> torch.Tensor:
        """The image with its pinned crop: `(1, 3, height, width)`."""
        shard, row = self.places[index]
        entry, path = self.shards[shard]["maps"][row], self.image(index)
        if not path.is_file():
            raise FileNotFoundError(
                f"The teacher cache {self.folder} needs {path}, which is gone. Put it back, or: {AGAIN}."
            )
        if path.stat().st_size != entry["bytes"] or sha256(path) != entry["sha256"]:
            raise ValueError(f"{path} is not the image that {self.folder} was made from. Put it back, or: {AGAIN}.")
        image = Crop(**entry["crop"])(read_image(path))
        return self.image_processor(image, do_resize=False, return_tensors="pt")["pixel_values"]

    def target(self, index: int) -> torch.Tensor:
        """The teacher's map: `(1, dim, height / patch, width / patch)` float32."""
        shard, row = self.places[index]
        path = self.folder / self.shards[shard]["file"]
        if shard not in self.checked:
            check_shard(path, self.shards[shard])
            self.checked.add(shard)
        with safe_open(path, framework="pt") as file:
            return file.get_tensor(str(row))[None].float()


def check_shard(path: Path, record: dict[str, Any]) -> None:
    """
    Compare a shard's checksum with its record.

    Raises:
        FileNotFoundError: there is no such shard.
        ValueError: it is damaged.
    """
    again = "Run the same command of training/cache_teacher.py again: it makes this shard alone anew."
    if not path.is_file():
        raise FileNotFoundError(f"The shard {path} is gone. {again}")
    if sha256(path) != record["sha256"]:
        raise ValueError(f"The shard {path} is damaged, its checksum is not the one in the manifest. {again}")


def seeded(seed: int, index: int) -> random.Random:
    """The random numbers of the `index`-th view, as distillation draws them for the `index`-th image of its stream."""
    return random.Random(f"photo-{seed}-{index}")
