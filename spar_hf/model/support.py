"""Support images: annotated examples of classes that correct what the words say, by `corrections.py`."""

import itertools
import json
import os
import threading
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from transformers.utils import logging

from .corrections import choose_penalty, evenly, fit_corrections
from .file_modes import follow_umask
from .fingerprints import checksum, quick_fingerprint, vision_fingerprint
from .image_input import open_image, turn_upright
from .image_streams import EncodedImage
from .words import Vocabulary, normalise_name

logger = logging.get_logger(__name__)

FORMAT = "spar support images, 1"
VERSIONS = itertools.count()
PATCHES = 32  # of a mask that are kept, evenly spread; neighbours are much alike
FILLED = 0.5  # share of a patch that a mask must cover, where any patch reaches it
WORKING_VALUES = 2**20  # patches x names while corrections are fitted


@dataclass(frozen=True)
class Example:
    """
    What is kept of a mask.

    Attributes:
        label: its class.
        image: number of its image.
        features: of its patches, of unit length, `(patches, dim)` float16.
    """

    label: str
    image: int
    features: torch.Tensor


def mask_shares(mask: Any, size: tuple[int, int], working_size: tuple[int, int], patch_size: int) -> torch.Tensor:
    """
    The share of every patch that a mask covers.

    Args:
        mask: PIL image, file or array of the size of the image: 0 outside the class, and one other value inside.
        size: height and width of the image.
        working_size: height and width that the model saw, before its padding.
        patch_size: side of a patch in pixels of the working image.

    Returns:
        `(ceil(height / patch), ceil(width / patch))` float32.

    Raises:
        ValueError: no mask, one of another size, with several values beside 0 (a label map, scores), or an empty one.

    Example:

    ```python
    >>> mask = np.zeros((32, 64), bool)
    >>> mask[:, :24] = True
    >>> mask_shares(mask, (32, 64), (32, 64), 16).tolist()
    [[1.0, 0.5, 0.0, 0.0], [1.0, 0.5, 0.0, 0.0]]
    ```"""
    if isinstance(mask, torch.Tensor):
        mask = mask.cpu().numpy()
    if isinstance(mask, Image.Image | str | os.PathLike):
        given = (mask, None) if isinstance(mask, Image.Image) else open_image(os.fspath(mask), urls=False)
        image = turn_upright(*given)
        if len(image.getbands()) != 1:
            raise ValueError(f"A mask has one channel, 0 outside the class; this one is of mode {image.mode}.")
        mask = np.asarray(image)
    mask = np.asarray(mask)
    if mask.shape != tuple(size):
        raise ValueError(
            f"The mask has shape {mask.shape}, but the image {size[0]} × {size[1]} pixels (height × width). A mask is "
            "drawn in the size of its image."
        )
    inside = mask != 0
    if not inside.any():
        raise ValueError("The mask is empty: no pixel of it belongs to the class.")
    if (mask[inside] != mask[inside][0]).any():  # NaN too, which is not equal to itself
        raise ValueError(
            "A mask is 0 outside the class and has one other value inside; this one has several. Of a label map pass "
            "`label_map == number`, of scores `scores > 0.5`, of grey levels `levels > 127`."
        )
    levels = Image.fromarray(inside.astype(np.uint8) * 255).resize(working_size[::-1], Image.Resampling.BOX)
    height, width = (-(-side // patch_size) for side in working_size)
    padded = np.zeros((height * patch_size, width * patch_size), np.uint8)
    padded[: working_size[0], : working_size[1]] = np.asarray(levels)
    shares = padded.reshape(height, patch_size, width, patch_size).mean((1, 3), dtype=np.float32) / 255
    return torch.from_numpy(shares)


def example_of(encoded: EncodedImage, mask: Any, patch_size: int, label: str, image: int) -> Example:
    """
    The features of an image in a mask.

    Raises:
        ValueError: as [`mask_shares`], or a mask so small that no patch sees it.
    """
    shares = mask_shares(mask, encoded.original_size, encoded.working_size, patch_size).flatten()
    if not shares.any():
        raise ValueError("The mask covers too little of any patch. Crop the image around it, or set a larger `size`.")
    place = evenly((shares >= min(FILLED, float(shares.max()))).nonzero().flatten(), PATCHES)
    features = encoded.feature_map.flatten(1)[:, place.to(encoded.feature_map.device)].T
    return Example(label, image, nn.functional.normalize(features.float(), dim=-1).half().cpu())


class SupportSet:
    """
    The examples of some classes.

    Attributes:
        examples: in the order in which they were added.
        version: a number that no other state of any set has.
        penalty: how strongly corrections are pulled back to the words. `None`: chosen for each vocabulary.
        chosen: the penalty in the last call.
    """

    def __init__(self) -> None:
        self.examples: list[Example] = []
        self.version = next(VERSIONS)
        self.penalty: float | None = None
        self.chosen: float | None = None

    def __len__(self) -> int:
        return len(self.examples)

    def counts(self) -> dict[str, int]:
        """Number of examples per class."""
        return dict(Counter(example.label for example in self.examples))

    def next_image(self) -> int:
        """A number that no image has yet."""
        return max((example.image for example in self.examples), default=-1) + 1

    def change(self, examples: Iterable[Example]) -> None:
        """Replace the examples."""
        self.examples = list(examples)
        self.version = next(VERSIONS)

    def save(self, path: str | os.PathLike, fingerprint: str) -> None:
        """
        Write the examples to a safetensors file: the tensor `features` `(patches, dim)` float16, and as metadata the label,
        image and number of patches of every example, and the fingerprint of the vision tower.
        """
        metadata = {
            "format": FORMAT,
            "labels": json.dumps([example.label for example in self.examples]),
            "images": json.dumps([example.image for example in self.examples]),
            "patches": json.dumps([len(example.features) for example in self.examples]),
            "fingerprint": fingerprint,
        }
        target = Path(path)
        temporary = target.with_name(f".{os.getpid()}-{threading.get_ident()}.partial")
        try:
            save_file({"features": torch.cat([e.features for e in self.examples])}, temporary, metadata=metadata)
            follow_umask(temporary)
            temporary.replace(target)
        except SafetensorError as error:
            raise OSError(f"Cannot write {str(path)!r}: {error}") from error
        finally:
            temporary.unlink(missing_ok=True)

    @staticmethod
    def read(path: str | os.PathLike, fingerprint: str, dim: int) -> list[Example]:
        """
        The examples of a file.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: another kind of file, a damaged one, or one of another vision tower.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"{str(path)!r} does not exist. Write it with `save_support` or `spar-hf support`.")
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FORMAT:
                    raise ValueError(f"{str(path)!r} holds no support images that `save_support` wrote.")
                features = file.get_tensor("features")
        except SafetensorError as error:
            raise ValueError(
                f"{str(path)!r} is not a safetensors file, or damaged: {error}. Write it again."
            ) from error
        labels, images, patches = (json.loads(metadata[name]) for name in ("labels", "images", "patches"))
        if metadata["fingerprint"] != fingerprint:
            raise ValueError(
                f"{str(path)!r} was made with another vision tower, so its features do not fit this model. Write it again "
                "with `save_support` of this model."
            )
        if len(labels) != len(patches) or features.shape != (sum(patches), dim):
            raise ValueError(
                f"{str(path)!r} holds features of shape {tuple(features.shape)}, not ({sum(patches)}, {dim})."
            )
        return [Example(*parts) for parts in zip(labels, images, features.split(patches), strict=True)]


class SupportedModel:
    """
    A model whose `dense_logits` take rows of any length: the logit is the length times that of the unit row. What else is
    asked of the model is its own.
    """

    def __init__(self, model: Any):
        self.model, self.config = model, model.config

    def dense_logits(self, feature_map: torch.Tensor, text_embeds: torch.Tensor) -> torch.Tensor:
        """`(batch, dim, h, w)` and `(names, dim)` -> `(batch, names, h, w)`."""
        lengths = text_embeds.float().norm(dim=-1)[:, None, None]
        return self.model.dense_logits(feature_map, text_embeds) * lengths.to(feature_map.device)


class SupportImages:
    """The methods of the pipeline for support images."""

    support: SupportSet
    _supported_by: tuple = ()  # quick fingerprint and checksum of the vision tower that encoded them

    def add_support(
        self,
        examples: Sequence[tuple[Any, Any, str]],
        size: Any = None,
        max_tokens: int | None = None,
        image_range: Sequence[float] | None = None,
    ) -> dict[str, int]:
        """
        Add annotated images of classes; from then on, they correct the words of these classes in every call.

        Args:
            examples:
                `(image, mask, class)` each. The image is one that the pipeline takes, or an [`EncodedImage`]. The mask has
                its size: a PIL image of one channel, a file or an array, 0 outside the class. Nothing is assumed of the
                pixels outside. The class is the label of one of the later `candidate_labels` or one of its names;
                `"background"` is the background. One image may come several times, with other masks; in a row it is encoded
                once. Give all triples of an image in one call: those of another call count as another image.
            size, max_tokens, image_range: as in the call. Take the `size` of the later calls.

        Returns:
            Number of examples of each class so far.

        Raises:
            ValueError: no triples, an empty label, a mask that is empty or of another size than its image; then nothing is
                added.

        Example:

        ```python
        >>> from transformers import pipeline
        >>> import spar_hf

        >>> segment = pipeline("open-vocab-segmentation")
        >>> image, mask = Image.new("RGB", (96, 64), "olive"), np.ones((64, 96), bool)
        >>> segment.add_support([(image, mask, "moss")])
        {'moss': 1}
        >>> segment.support.penalty = 0.01  # trust it: a single image cannot show that it is better than the words
        >>> segment(image, candidate_labels=["sky", "moss"])[0]["label"]
        'moss'
        >>> segment.clear_support()
        ```"""
        pipe: Any = self
        self._check_tower()
        found: list[Example] = []
        first, last, encoded = self.support.next_image(), None, None
        numbers: dict[Any, int] = {}  # of each image in this call: one image must not vouch for itself
        for i, example in enumerate(examples := list(examples)):  # the list keeps the images, and with them their ids
            if isinstance(example, str | bytes) or not isinstance(example, Sequence) or len(example) != 3:
                raise ValueError('Support images are a list of triples: [("dog.jpg", "dog_mask.png", "dog")].')
            image, mask, label = example
            if not isinstance(label, str) or not label.strip():
                raise ValueError(f"The class of support image {i} must be a word, got {label!r}.")
            key = os.fspath(image) if isinstance(image, str | os.PathLike) else id(image)
            if encoded is None or key != last:
                given = isinstance(image, EncodedImage)
                encoded = image if given else pipe._encode_whole(image, size, max_tokens, image_range)
                if not isinstance(encoded, EncodedImage):
                    raise ValueError(f"Support image {i} is several images. Give a triple for each.")
                last = key
            number = numbers.setdefault(key, first + len(numbers))
            try:
                found.append(example_of(encoded, mask, pipe.model.config.patch_size, label.strip(), number))
            except ValueError as error:
                raise ValueError(f"Support image {i}, {label!r}: {error}") from error
        self.support.change([*self.support.examples, *found])
        self._note_tower()
        return self.support.counts()

    def clear_support(self, label: str | None = None) -> None:
        """
        Remove the support images of a class, or all.

        Raises:
            ValueError: the class has none.
        """
        others = [] if label is None else self.support.examples
        kept = [e for e in others if normalise_name(e.label) != normalise_name(str(label))]
        if label is not None and len(kept) == len(self.support):
            known = ", ".join(self.support.counts()) or "none were added"
            raise ValueError(f"There are no support images of {label!r}; of: {known}.")
        self.support.change(kept)

    def save_support(self, path: str | os.PathLike) -> None:
        """
        Write the support images to a safetensors file: features of the patches in their masks, no pixels.

        Raises:
            ValueError: there are none, or the vision tower has changed since they were added.
        """
        if not len(self.support):
            raise ValueError("There are no support images to save. Add some with `add_support`.")
        self._check_tower()
        pipe: Any = self
        self.support.save(path, vision_fingerprint(pipe.model.vision_model))

    def load_support(self, path: str | os.PathLike) -> dict[str, int]:
        """
        Add the support images of a file that `save_support` wrote. Returns the number of examples of each class so far.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: another kind of file, or one of another vision tower.
        """
        pipe: Any = self
        fingerprint = vision_fingerprint(pipe.model.vision_model)
        found = self.support.read(path, fingerprint, pipe.model.config.projection_dim)
        if self._changed():
            logger.warning("The vision tower has changed: the support images that were added before are dropped.")
            self.support.change([])
        first = self.support.next_image()
        self.support.change([*self.support.examples, *(replace(e, image=e.image + first) for e in found)])
        self._note_tower()
        return self.support.counts()

    def _note_tower(self) -> None:
        """Keep what tells the vision tower of the support images from another one."""
        tower = cast(Any, self).model.vision_model
        self._supported_by = (quick_fingerprint(tower), checksum(tower))

    def _changed(self) -> bool:
        """Whether the vision tower is another one than that which encoded the support images."""
        if not len(self.support):
            return False
        tower = cast(Any, self).model.vision_model
        quick, total = self._supported_by
        now = quick_fingerprint(tower)
        if now == quick:
            return False
        if checksum(tower) != total:
            return True
        self._supported_by = (now, total)  # the same weights at another place: moved to a GPU, or copied
        return False

    def _check_tower(self) -> None:
        """Raises ValueError if the vision tower has changed since the support images were added."""
        if self._changed():
            raise ValueError(
                "The vision tower has changed since the support images were added. Call `clear_support` and add them again."
            )

    def check_support(self, vocabulary: Vocabulary) -> None:
        """
        Say which support images take no part in a vocabulary.

        Raises:
            ValueError: none does, or the vision tower has changed since they were added.
        """
        self._check_tower()
        known = {normalise_name(name) for names in (vocabulary.labels, vocabulary.all_names) for name in names}
        missing = [label for label in self.support.counts() if normalise_name(label) not in known]
        if len(missing) == len(self.support.counts()):
            raise ValueError(
                f"None of the classes is one with support images: {', '.join(missing[:10])}. Name one of them in "
                "`candidate_labels`, or call `clear_support`."
            )
        if missing:
            logger.warning_once(f"Support images of other classes take no part: {', '.join(missing[:10])}.")

    def supported(self, vocabulary: Vocabulary, templates: Any = None) -> tuple[Any, torch.Tensor]:
        """
        What gives the logits of names, and the rows to give it: the model and the text embeddings, or with support images a
        [`SupportedModel`] and corrected embeddings `(names, dim)`, which are not of unit length.
        """
        pipe: Any = self
        text_embeds = pipe.text_embeds(vocabulary, templates, check_weights=False)
        if not len(self.support):
            return pipe.model, text_embeds
        self.check_support(vocabulary)
        scale, penalty = pipe.model.config.dense_logit_scale, self.support.penalty
        prompts = str(pipe.model.config.templates if templates is None else templates)
        key = ("support", self.support.version, penalty, vocabulary, prompts, scale)
        fitted = pipe.texts.remember(key, lambda: self._corrections(vocabulary, text_embeds, scale))
        self.support.chosen, corrections = fitted
        name_to_class = vocabulary.name_to_class.to(text_embeds.device)
        return SupportedModel(pipe.model), text_embeds + corrections.to(text_embeds.device)[name_to_class] / scale

    def _corrections(
        self, vocabulary: Vocabulary, text_embeds: torch.Tensor, scale: float
    ) -> tuple[float, torch.Tensor]:
        """The penalty, and [`fit_corrections`] for the classes of a vocabulary, `(classes, dim)`."""
        device, support = text_embeds.device, self.support
        numbers = {normalise_name(name): i for i, some in enumerate(vocabulary.names) for name in some}
        numbers |= {normalise_name(label): i for i, label in enumerate(vocabulary.labels)}
        used = [(numbers[name], e) for e in support.examples if (name := normalise_name(e.label)) in numbers]
        most = max(1, WORKING_VALUES // (len(used) * len(vocabulary.all_names)))
        parts = [evenly(example.features, most) for _, example in used]
        lengths = torch.tensor([len(part) for part in parts])
        classes = torch.tensor([number for number, _ in used]).repeat_interleave(lengths).to(device)
        images = torch.tensor([example.image for _, example in used]).repeat_interleave(lengths).to(device)
        features = torch.cat(parts).float().to(device)
        of_names = scale * features @ text_embeds.T
        logits = of_names.new_full((len(features), len(vocabulary.labels)), -torch.inf)
        logits.scatter_reduce_(1, vocabulary.name_to_class.to(device).expand_as(of_names), of_names, "amax")
        penalty = support.penalty
        if penalty is None:
            penalty = choose_penalty(features, classes, logits, images)
        return penalty, fit_corrections(features, classes, logits, penalty)
