"""Linear heads on dense features: one per learning rate, trained together at pixels drawn from every image."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from spar_hf.data.segmentation_sets import IGNORE_INDEX
from spar_hf.heads.frozen_features import ImageFeatures
from spar_hf.model.segmentation import bilinear_cells, patch_coordinates


class LinearHeads(nn.Module):
    """
    Batch norm over features of width `dim`, and `heads` linear layers, one per learning rate. The norm, which has no weights
    of its own, is common to all.
    """

    def __init__(self, dim: int, classes: int, heads: int):
        super().__init__()
        self.norm = nn.BatchNorm1d(dim, affine=False)
        layers = [nn.Linear(dim, classes) for _ in range(heads)]
        for layer in layers:
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)
        self.linear = nn.ModuleList(layers)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """`(patches, dim)` -> `(heads, patches, classes)`, in float32: `--mixed_precision` concerns the vision model."""
        with torch.autocast(features.device.type, enabled=False):
            features = self.norm(features)
            return torch.stack([layer(features) for layer in self.linear])

    @torch.no_grad()
    def without_norm(self) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Linear layers that give the same logits without the norm, whose running statistics they absorb.

        Returns:
            Weights `(heads, classes, dim)` and biases `(heads, classes)`, float64 on the CPU: Apple's GPUs have no float64.
        """
        state = {name: tensor.cpu().double() for name, tensor in self.state_dict().items()}
        weight = torch.stack([state[f"linear.{i}.weight"] for i in range(len(self.linear))])
        bias = torch.stack([state[f"linear.{i}.bias"] for i in range(len(self.linear))])
        weight = weight * (state["norm.running_var"] + self.norm.eps).rsqrt()
        return weight, bias - weight @ state["norm.running_mean"]


@dataclass
class DrawnPixels:
    """
    Features of an image and some of its labelled pixels.

    Attributes:
        features: `(dim, h, w)` float32.
        rows, columns: of the pixels in the image, `(pixels,)` int64.
        labels: classes of the pixels, `(pixels,)` int64.
        working_size, image_size: height and width, see [`ImageFeatures`].
    """

    features: torch.Tensor
    rows: torch.Tensor
    columns: torch.Tensor
    labels: torch.Tensor
    working_size: tuple[int, int]
    image_size: tuple[int, int]


def draw_pixels(
    image: ImageFeatures, mask: np.ndarray, pixels: int, seed: list[int], device: torch.device
) -> DrawnPixels:
    """Draw at most `pixels` labelled pixels of an image, without replacement, as the seed says."""
    labelled = np.flatnonzero(mask != IGNORE_INDEX)
    if len(labelled) > pixels:
        labelled = np.random.default_rng(seed).choice(labelled, pixels, replace=False, shuffle=False)
    rows, columns = np.unravel_index(labelled, mask.shape)
    return DrawnPixels(
        features=image.features.to(device).float(),
        rows=torch.from_numpy(rows).to(device),
        columns=torch.from_numpy(columns).to(device),
        labels=torch.from_numpy(mask.ravel()[labelled].astype(np.int64)).to(device),
        working_size=image.working_size,
        image_size=image.image_size,
    )


def logits_at_pixels(logits: torch.Tensor, image: DrawnPixels, patch_size: int) -> torch.Tensor:
    """
    Bilinear logits at the drawn pixels of an image, read between patch centres as masks are:
    `(heads, h, w, classes)` -> `(heads, pixels, classes)`.
    """
    vertical, horizontal = (
        patch_coordinates(image.image_size[axis], image.working_size[axis], patch_size, side, logits.device)
        for axis, side in enumerate(logits.shape[1:3])
    )
    cells, weights = bilinear_cells(image.rows, image.columns, vertical, horizontal, logits.shape[2])
    return (logits.flatten(1, 2)[:, cells] * weights[..., None]).sum(2)


def batch_loss(heads: nn.Module, batch: list[DrawnPixels], patch_size: int) -> torch.Tensor:
    """
    Cross entropy of every head, mean over all drawn pixels of the batch: `(heads,)`.

    Pixels drawn at random give the mean over all pixels in expectation, without the memory of all pixels.
    """
    patches = [image.features[0].numel() for image in batch]
    # the (dim, h, w) of all images -> (patches of all images, dim), so that the norm sees the whole batch
    logits = heads(torch.cat([image.features.flatten(1).T for image in batch]))
    at_pixels = [
        logits_at_pixels(part.unflatten(1, image.features.shape[1:]), image, patch_size)
        for image, part in zip(batch, logits.split(patches, dim=1), strict=True)
    ]
    labels = torch.cat([image.labels for image in batch])
    return torch.stack([nn.functional.cross_entropy(of_head, labels) for of_head in torch.cat(at_pixels, dim=1)])
