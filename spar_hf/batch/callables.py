"""
Features and masks of a batch of rows, for engines that spread rows over processes and machines: Ray Data, `datasets`, Spark.

An object is made from options alone. It loads its model at the first batch, in the process that computes, and is pickled
without it. A call takes a dict of columns and returns one. Nothing here imports an engine.

```python
features = SparFeatures(size=448, dtype="float16")
dataset.map(features, batched=True, batch_size=16, with_rank=True, num_proc=2)          # datasets
rows.map_batches(SparFeatures, fn_constructor_kwargs={"size": 448}, concurrency=(1, 4), num_gpus=1)  # Ray Data
frame.mapInPandas(features.map_pandas, schema)                                          # Spark
```

Columns are made for Arrow: arrays of varying shape are bytes with `shape` and `dtype`, and every column has the same type in
every batch, also where all images failed.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from spar_hf.batch.columns import Columns, as_column, coco, image_of_cell, is_missing, png, run_lengths
from spar_hf.batch.extractor import (
    DTYPES,
    FeatureExtractor,
    ImagePreparation,
    PreparedImage,
    layer_key,
    parse_layers,
    same_size_groups,
)
from spar_hf.model.fingerprints import text_fingerprint, vision_fingerprint, weights_hash
from spar_hf.model.modeling_spar import SparForOpenVocabSegmentation
from spar_hf.model.pipeline import OpenVocabSegmentationPipeline
from spar_hf.model.processing_spar import SparProcessor
from spar_hf.model.prompts import Vocabulary
from spar_hf.model.templates import read_templates
from spar_hf.registration import SPAR_TINY
from spar_hf.teacher import SlidingWindowTeacher
from spar_hf.utils.errors import UsageError

MASKS = ("png", "coco")
# of the pipeline, that a mask depends on
MASK_OPTIONS = ("background", "threshold", "min_area", "templates", "presence", "min_presence", "refine", "upsampler")
# results that all callables have: where all of them are columns, another callable made the rows, and this one follows
SHARED = ("original_size", "working_size", "fingerprint", "error")
# what an image may do to a forward pass; anything else is a bug and stops the work
IMAGE_ERRORS = (ValueError, OSError, torch.OutOfMemoryError)


class BatchCallable:
    """
    What the callables share: columns in and out, images of one size in one forward pass, errors by row.

    Args:
        column: of the images: bytes of files, paths, URLs (also `s3://` and others of fsspec), PIL images or arrays.
        batch_size: images of one size that share a forward pass at most.
        device: of the model. Default: the CUDA device of the process's rank if there is one, else the CPU.
    """

    error_values: Columns  # a row of an image that failed, without `error`

    def __init__(self, column: str, batch_size: int, device: str | None):
        if batch_size < 1:
            raise UsageError(f"batch_size={batch_size} must be at least 1.")
        self.column, self.batch_size, self.device = column, batch_size, device
        self.loaded: Any = None
        self.holds_images: bool | None = None  # whether the column holds images, not names; as far as is known

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "loaded": None, "holds_images": None}

    def load(self, device: str | None) -> Any:
        """What computes, with its model on a device; called once per process."""
        raise NotImplementedError

    def prepare(self, source: Any) -> PreparedImage:
        """Read and preprocess an image."""
        raise NotImplementedError

    def encode(self, images: Sequence[PreparedImage]) -> list[Columns]:
        """One forward pass for images of one working size: the columns of each."""
        raise NotImplementedError

    def __call__(self, batch: Mapping[str, Any], rank: int | None = None) -> Columns:
        """
        Args:
            batch: columns of equal length; the one of images, and any others.
            rank: of this process, as `datasets.map(..., with_rank=True)` says: its number of the CUDA device.

        Returns:
            The columns of the batch, and those of the class. Images themselves are left out; paths and URLs stay, as text,
            also where some are missing. A column whose first batches hold nothing at all is taken for one of images. Of rows
            that another callable made, an error stays too.

        Raises:
            UsageError: there is no column of images, a column has the name of a result, or the model cannot be loaded.
        """
        if self.column not in batch:
            raise UsageError(f"There is no column {self.column!r} of images; the columns are {', '.join(batch)}.")
        self.start(rank)
        results, follows = {*self.error_values, "error"}, all(name in batch for name in SHARED)
        if clash := ", ".join(name for name in batch if name in results and not (follows and name in SHARED)):
            raise UsageError(
                f"The columns {clash} would be replaced by results of the same name. Rename them, or remove those of an "
                "earlier call."
            )
        sources = list(batch[self.column])
        prepared: list[PreparedImage | str] = []
        for source in sources:
            try:
                prepared.append(self.prepare(image_of_cell(source)))
            except Exception as error:  # each decoder raises its own kind
                prepared.append(str(error) or type(error).__name__)
        rows = self.rows_of(prepared)
        if follows:  # what was computed before has failed still
            for row, before in zip(rows, batch["error"], strict=True):
                row["error"] = "; ".join(dict.fromkeys(error for error in (before, row["error"]) if error))
        rows = rows or [self.failed("")]  # an empty batch has columns of the same types
        found = {name: as_column([row[name] for row in rows])[: len(sources)] for name in (*self.error_values, "error")}
        kept = dict(batch)
        if there := [source for source in sources if not is_missing(source)]:
            self.holds_images = not all(isinstance(source, str | os.PathLike) for source in there)
        if self.holds_images or (self.holds_images is None and sources):
            del kept[self.column]
        elif not all(isinstance(source, str) for source in sources):
            kept[self.column] = as_column([None if is_missing(source) else os.fspath(source) for source in sources])
        return {**kept, **found}

    def rows_of(self, prepared: Sequence[PreparedImage | str]) -> list[Columns]:
        """The row of each image that was read, or of the reason why it was not. Images of one size share a forward pass."""
        rows = [self.failed(image) if isinstance(image, str) else {} for image in prepared]
        read = [(position, image) for position, image in enumerate(prepared) if not isinstance(image, str)]
        for group in same_size_groups([image for _, image in read], self.patch_size, self.batch_size):
            for place, row in zip(group, self._guarded([read[i][1] for i in group]), strict=True):
                rows[read[place][0]] = row
        return rows

    def map_pandas(self, frames: Iterable[Any]) -> Iterator[Any]:
        """The call for an iterator of pandas frames, as Spark's `mapInPandas` wants it."""
        for frame in frames:
            yield type(frame)(self({name: frame[name].to_numpy() for name in frame.columns}))

    def start(self, rank: int | None = None) -> None:
        """Load the model, unless it is."""
        if self.loaded is None:
            device = self.device
            if device is None and rank is not None and torch.cuda.is_available():
                device = f"cuda:{rank % torch.cuda.device_count()}"
            self.loaded = self.load(device)

    @property
    def patch_size(self) -> int:
        """Side of a patch in pixels."""
        raise NotImplementedError

    def failed(self, reason: str) -> Columns:
        """The row of an image that failed: empty values and the reason."""
        return {**self.error_values, "error": reason}

    def _guarded(self, images: list[PreparedImage]) -> list[Columns]:
        """[`encode`], one by one where it fails for all together, as when memory is short."""
        try:
            return [{**row, "error": ""} for row in self.encode(images)]
        except IMAGE_ERRORS as error:
            if len(images) == 1:
                return [self.failed(str(error) or type(error).__name__)]
        return [row for image in images for row in self._guarded([image])]


class SparFeatures(BatchCallable):
    """
    Dense features of images.

    Columns out: `features` (the bytes of an array in row-major order), `shape` (`[dim, h, w]`; `[dim]` with `pool`) and
    `dtype`; for a block `layer_3` and `layer_3_shape`; `original_size` and `working_size` (`[height, width]` in pixels);
    `fingerprint` of the weights and the image processor; `error` (empty unless the image failed).
    [`~spar_hf.batch.arrays.read_array`] turns a row into an array again.

    Args:
        model, normalize, dtype, stride, window_size, max_tokens, image_range, layers, pool, size: see
            [`FeatureExtractor`]. A `size` is what the pipeline takes.
        column, batch_size, device: see [`BatchCallable`].

    Raises:
        UsageError: at the first call, what [`FeatureExtractor`] refuses.

    Example:

    ```python
    >>> features = SparFeatures(size=96)
    >>> pixels = np.zeros((200, 330, 3), np.uint8)
    >>> found = features({"image": [pixels, "no such file"], "id": np.array([7, 8])})
    >>> found["id"].tolist(), found["shape"][0], len(found["features"][0])
    ([7, 8], [192, 6, 10], 23040)
    >>> found["error"].tolist()
    ['', "'no such file' is neither a file nor a URL (http://, https:// or data:image/). Check the spelling and, ..."]
    ```"""

    def __init__(
        self,
        model: str | None = None,
        size: Any = None,
        dtype: str = "float16",
        layers: str | Sequence[str | int] = "features",
        pool: str | None = None,
        normalize: bool = False,
        stride: int | None = None,
        window_size: int | None = None,
        max_tokens: int | None = None,
        image_range: tuple[float, float] | None = None,
        column: str = "image",
        batch_size: int = 16,
        device: str | None = None,
    ):
        super().__init__(column, batch_size, device)
        if dtype not in DTYPES:
            raise UsageError(f"Unknown dtype {dtype!r}; use one of {', '.join(DTYPES)}.")
        self.layers = parse_layers(layers)
        self.options = {
            "model": model,
            "size": size,
            "dtype": dtype,
            "layers": self.layers,
            "pool": pool,
            "normalize": normalize,
            "stride": stride,
            "window_size": window_size,
            "max_tokens": max_tokens,
            "image_range": image_range,
        }
        self.files = folder_stamp(model)  # `datasets` caches results by the pickled object
        axes = 3 if pool is None else 1
        self.error_values = {
            **{
                name: value
                for names in self.names.values()
                for name, value in zip(names, (b"", [0] * axes), strict=True)
            },
            **{"dtype": dtype, "original_size": [0, 0], "working_size": [0, 0], "fingerprint": ""},
        }

    @property
    def names(self) -> dict[str, tuple[str, str]]:
        """By tensor: the columns of bytes and shape."""
        own = {"feature_map": ("features", "shape")}
        return {key: own.get(key, (key, f"{key}_shape")) for key in map(layer_key, self.layers)}

    def load(self, device: str | None) -> FeatureExtractor:
        return FeatureExtractor(**self.options, device=device)

    @property
    def patch_size(self) -> int:
        return self.loaded.encoder.config.patch_size

    @property
    def settings(self) -> dict[str, Any]:
        """See [`FeatureExtractor.settings`]. Loads the model."""
        self.start()
        return self.loaded.settings

    def prepare(self, source: Any) -> PreparedImage:
        return self.loaded.prepare(source)

    def encode(self, images: Sequence[PreparedImage]) -> list[Columns]:
        rows = []
        for image, tensors in zip(images, self.loaded.encode(images), strict=True):
            row: Columns = {"dtype": self.options["dtype"], "fingerprint": self.loaded.settings["fingerprint"]}
            for key, (name, shape) in self.names.items():
                row |= {name: tensors[key].view(torch.uint8).numpy().tobytes(), shape: list(tensors[key].shape)}
            rows.append({**row, **{name: image.record[name] for name in ("original_size", "working_size")}})
        return rows


class SparTeacher(SparFeatures):
    """
    Features of the sliding-window teacher, in the columns of [`SparFeatures`].

    Args:
        model, size, dtype, normalize, max_tokens, image_range, column, batch_size, device: see [`SparFeatures`].
        stride: of the windows in pixels. Default: one and a half patches.
        window_size, window_batch_size, scales, flip: see [`SlidingWindowTeacher`].

    Example:

    ```python
    >>> teacher = SparTeacher(size=96, stride=48, window_size=64)
    >>> teacher({"image": [np.zeros((96, 128, 3), np.uint8)]})["shape"].tolist()
    [[192, 6, 8]]
    ```"""

    def __init__(
        self,
        model: str | None = None,
        size: Any = None,
        stride: int | None = None,
        window_size: int | None = None,
        window_batch_size: int = 16,
        scales: Sequence[float] = (1.0,),
        flip: bool = False,
        dtype: str = "bfloat16",
        **options: Any,
    ):
        super().__init__(model, size, dtype, **options)
        if self.layers != ("features",) or self.options["pool"] == "head":
            raise UsageError("A sliding window averages the features alone: leave out layers and the pooling head.")
        self.windows: dict[str, Any] = {
            "window_size": window_size,
            "stride": stride,
            "window_batch_size": window_batch_size,
            "scales": tuple(scales),
            "flip": flip,
        }

    def load(self, device: str | None) -> FeatureExtractor:
        extractor = super().load(device)
        fingerprint = extractor.settings["fingerprint"]  # of the model alone
        extractor.encoder = teacher = SlidingWindowTeacher(extractor.encoder, **self.windows).eval()
        stated = {**self.windows, "window_size": teacher.window_size, "stride": teacher.stride}
        text = json.dumps([fingerprint, stated], sort_keys=True)
        extractor.settings |= stated | {"fingerprint": hashlib.sha256(text.encode()).hexdigest()[:20]}
        return extractor


class SparSegmenter(BatchCallable):
    """
    Masks from words.

    Columns out: `labels` and `scores` of all classes (0 where a class has no pixels), the background among them;
    `background`, its number (-1: none); `presence` of all classes, if that is asked for; `map`, the class number of every
    pixel as a PNG of 8 bits, of 16 above 256 classes, or `masks`, JSON of a list with `label`, `score`, `size` and `counts`
    (COCO's run lengths) for each class that has pixels; `original_size`, `working_size`, `fingerprint` and `error` as in
    [`SparFeatures`].

    Args:
        model: folder or hub id of a two-tower model; the embedded spar-tiny by default.
        candidate_labels: the classes, as in the pipeline.
        masks: `"png"`, or `"coco"`, which needs pycocotools (extra coco).
        size, max_tokens, image_range: of reading, as in the pipeline.
        column, batch_size, device: see [`BatchCallable`].
        options: of the pipeline: `background`, `threshold`, `min_area`, `templates`, `presence`, `min_presence`, `refine`,
            `upsampler`.

    Raises:
        UsageError: an unknown form of masks, no labels, or another option.
        ValueError, OSError: a file of templates that cannot be read.
        ValueError: at the first call, what the pipeline refuses.

    Example:

    ```python
    >>> from io import BytesIO
    >>> segment = SparSegmenter(candidate_labels=["road", "sky"], background="auto", size=96)
    >>> found = segment({"image": [Image.new("RGB", (64, 48), "skyblue")]})
    >>> found["labels"][0], Image.open(BytesIO(found["map"][0])).size
    (['road', 'sky', 'background'], (64, 48))
    ```"""

    def __init__(
        self,
        model: str | None = None,
        candidate_labels: Any = None,
        masks: str = "png",
        size: Any = None,
        max_tokens: int | None = None,
        image_range: tuple[float, float] | None = None,
        column: str = "image",
        batch_size: int = 16,
        device: str | None = None,
        **options: Any,
    ):
        super().__init__(column, batch_size, device)
        if masks not in MASKS:
            raise UsageError(f"Unknown masks {masks!r}; use one of {', '.join(MASKS)}.")
        if candidate_labels is None:
            raise UsageError('`candidate_labels` is missing. Name the classes to look for: ["road", "sky"].')
        self.model, self.vocabulary, self.masks = model, Vocabulary.parse(candidate_labels), masks
        self.reading = {"size": size, "max_tokens": max_tokens, "image_range": image_range}
        if others := ", ".join(name for name in options if name not in MASK_OPTIONS):
            raise UsageError(f"Unknown options {others}; masks have {', '.join(MASK_OPTIONS)}.")
        options["templates"] = read_templates(options.get("templates"))  # what a file says, not its name
        self.options = {name: value for name, value in options.items() if value is not None}
        self.files = folder_stamp(model)

    def load(self, device: str | None) -> Any:
        """The pipeline; options that it refuses are an error here, not in every row."""
        folder = SPAR_TINY if self.model is None else self.model
        two_towers: Any = SparForOpenVocabSegmentation.from_backbone(folder)
        processor: Any = SparProcessor.from_backbone(folder)
        parts = {"tokenizer": processor.tokenizer, "image_processor": processor.image_processor}
        pipe = OpenVocabSegmentationPipeline(model=two_towers, device=device, **parts)
        probe = self.segment(pipe, pipe.encode(Image.new("RGB", (32, 32))))
        if self.masks == "coco":
            run_lengths(np.zeros((1, 1), bool))
        else:
            png(probe)
        limits = {name: self.reading[name] for name in ("size", "max_tokens", "image_range")}
        self.preparation = ImagePreparation(pipe.image_processor, pipe.model.config.patch_size, **limits)
        digest = pipeline_fingerprint(pipe) + json.dumps([self.vocabulary.names, self.options], default=str)
        self.fingerprint = hashlib.sha256(digest.encode()).hexdigest()[:20]
        self.error_values = {
            **{"map" if self.masks == "png" else "masks": b"" if self.masks == "png" else ""},
            **{"labels": probe["labels"], "scores": [0.0] * len(probe["labels"]), "background": probe["background"]},
            **({"presence": [0.0] * len(probe["labels"])} if self.options.get("presence") else {}),
            **{"original_size": [0, 0], "working_size": [0, 0], "fingerprint": ""},
        }
        return pipe

    def __getstate__(self) -> dict[str, Any]:
        made_by_load = ("preparation", "fingerprint", "error_values")
        return {name: value for name, value in super().__getstate__().items() if name not in made_by_load}

    @property
    def patch_size(self) -> int:
        return self.preparation.patch_size

    def prepare(self, source: Any) -> PreparedImage:
        return self.preparation(source)

    def segment(self, pipe: Any, encoded: Any) -> dict[str, Any]:
        """The pipeline's `output="map"`."""
        return pipe(encoded, candidate_labels=self.vocabulary, output="map", **self.options)

    def encode(self, images: Sequence[PreparedImage]) -> list[Columns]:
        items = [
            {"pixel_values": image.pixel_values, "original_size": tuple(image.record["original_size"])}
            for image in images
        ]
        rows = []
        with self.loaded.texts.unchanged():  # else all weights of the text tower would be read for every image
            results = [self.segment(self.loaded, encoded) for encoded in self.loaded._encode(items)]
        for image, result in zip(images, results, strict=True):
            row: Columns = {name: result[name] for name in ("labels", "scores", "background")}
            row |= {"presence": result["presence"]} if self.options.get("presence") else {}
            row |= {"map": png(result)} if self.masks == "png" else {"masks": coco(result)}
            row |= {name: image.record[name] for name in ("original_size", "working_size")}
            rows.append({**row, "fingerprint": self.fingerprint})
        return rows


def pipeline_fingerprint(pipe: Any) -> str:
    """20 hexadecimal digits of everything in a segmentation pipeline that its masks depend on."""
    model = pipe.model
    parts = [
        vision_fingerprint(model.vision_model),
        text_fingerprint(model, pipe.tokenizer),
        weights_hash(model).hexdigest(),  # also what belongs to neither tower
        pipe.image_processor.to_json_string(),
        str((model.config.templates, model.config.dense_logit_scale)),
    ]
    if (calibration := getattr(model.config, "presence_calibration", None)) is not None:
        parts.append(str(list(calibration)))
    return hashlib.sha256("".join(parts).encode()).hexdigest()[:20]


def folder_stamp(model: str | None) -> list[Any]:
    """Names, sizes and times of the files of a local model, so that another model in the folder is another callable."""
    folder = Path(SPAR_TINY if model is None else model)
    if not folder.is_dir():
        return []
    files = sorted(path for path in folder.iterdir() if path.is_file())
    return [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files]
