"""
Learned upsamplers of features, run in windows of bounded size, and published ones by name.

An upsampler is a callable `(image, features) -> features`: `(1, 3, h * patch, w * patch)` and `(1, dim, h, w)` ->
`(1, dim, h * r, w * r)`, where `r` divides the patch.

Maps of more than 32 patches on an axis are read in windows of 24 patches and 4 more on either side. The margins are cropped,
not blended: the result of an upsampler that looks at most 4 patches far is then exactly that of the whole map, and nothing
is held twice. An upsampler with a wider view, or with norms over the whole image as AnyUp and NAF, gives other values in
windows than on the whole; they were trained on images about as large as a window.

| name | source | memory of a window (16 px patches), from its published code |
|---|---|---|
| `"anyup"` | AnyUp, Wimmer et al., arXiv 2510.12764, several backbones | 270 MB of attention, 130 MB per layer |
| `"naf"` | NAF, Chambon et al., arXiv 2511.18452; `natten`, 9 patches per axis or more | 270 MB per layer at most |
| `"uplift"` | UPLiFT, Walmer et al., arXiv 2601.17950; `omegaconf`, DINOv3 ViT-S+/16 only | 430 MB of attention |

All return features four times as fine. UPLiFT's published weights are for features of DINOv2 ViT-S/14 and DINOv3 ViT-S+/16,
of which SPAR has the second; it looks about 5 patches far. Its weights are fetched from the hub at first use. Tests run all
three with stand-ins for their code. Any other upsampler can be passed as a callable.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

Upsampler = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

TILE = 24  # patches per axis that a window contributes
OVERLAP = 4  # patches on either side that it sees beyond them
IMAGENET = (
    (0.485, 0.456, 0.406),
    (0.229, 0.224, 0.225),
)  # mean and deviation of the images that presets were trained on


def cell_side(what: str, shape: tuple[int, ...], source: tuple[int, ...], cell: int) -> int:
    """Side in pixels of the cells of a grid `(channels, h * r, w * r)` over a `source` with cells of `cell` pixels."""
    r = shape[-1] // source[-1]
    if len(shape) != 3 or tuple(shape) != (source[0], source[1] * r, source[2] * r) or r < 1 or cell % r:
        raise ValueError(
            f"{what} have shape {tuple(shape)} for a grid of {tuple(source)}; they must be (channels, height * r, "
            f"width * r) with an r that divides {cell}."
        )
    return cell // r


def windows(length: int) -> list[tuple[slice, slice]]:
    """
    The parts of an axis of patches, each with the window that it is computed from.

    Example:

    ```python
    >>> windows(32)
    [(slice(0, 32, None), slice(0, 32, None))]
    >>> windows(40)
    [(slice(0, 24, None), slice(0, 28, None)), (slice(24, 40, None), slice(20, 40, None))]
    ```"""
    if length <= TILE + 2 * OVERLAP:
        return [(slice(0, length), slice(0, length))]
    parts = [(start, min(start + TILE, length)) for start in range(0, length, TILE)]
    return [(slice(*part), slice(max(0, part[0] - OVERLAP), min(length, part[1] + OVERLAP))) for part in parts]


def upsampled_features(
    upsampler: Upsampler, image: torch.Tensor, feature_map: torch.Tensor, cell: int
) -> Iterator[tuple[tuple[slice, slice], torch.Tensor, int]]:
    """
    Finer features, window by window.

    Args:
        upsampler: see above.
        image (`torch.Tensor` of shape `(1, 3, h * cell, w * cell)`): the normalised image.
        feature_map (`torch.Tensor` of shape `(dim, h, w)`): dense features.
        cell: side of a patch in pixels.

    Yields:
        Rows and columns in the finer grid `(h * r, w * r)`, the features there, and the side of its cells, `cell / r`.

    Raises:
        ValueError: a result on an impossible grid, or windows of unequal `r`.
    """
    first = None
    for rows, tall in windows(feature_map.shape[1]):
        for columns, wide in windows(feature_map.shape[2]):
            features = feature_map[:, tall, wide]
            view = image[..., tall.start * cell : tall.stop * cell, wide.start * cell : wide.stop * cell]
            fine = upsampler(view, features[None])[0]
            side = cell_side("The upsampler's features", fine.shape, features.shape, cell)
            first = side if first is None else first
            if side != first:
                raise ValueError(f"The upsampler's features have cells of {first} and of {side} pixels in one image.")
            r = cell // side
            place = tuple(slice(part.start * r, part.stop * r) for part in (rows, columns))
            inner = [
                slice((part.start - window.start) * r, (part.stop - window.start) * r)
                for part, window in ((rows, tall), (columns, wide))
            ]
            yield (place[0], place[1]), fine[:, inner[0], inner[1]], side


@dataclass(frozen=True)
class Preset:
    """
    A published upsampler on torch.hub.

    Attributes:
        repository, entry: what `torch.hub.load` takes.
        packages: further packages that its code imports.
        factor: how much finer the features become.
        options: of the entry.
        doublings: steps that a model takes which doubles the resolution in each; 0 for one that takes the size to reach.
        splus: whether the weights are for features of DINOv3 ViT-S+/16 only.
    """

    repository: str
    entry: str
    packages: tuple[str, ...] = ()
    factor: int = 4
    options: tuple[tuple[str, Any], ...] = ()
    doublings: int = 0
    splus: bool = False

    def load(self) -> nn.Module:
        """
        The model, from code that is in the cache of torch.hub: code is not downloaded without being asked for.

        Raises:
            ImportError: the code or a package is missing.
        """
        return _load(self, torch.hub.get_dir())


PRESETS = {
    "anyup": Preset("wimmerth/anyup", "anyup_multi_backbone"),
    "naf": Preset("valeoai/NAF", "naf", ("natten", "einops")),
    "uplift": Preset(
        "mwalmer-umd/UPLiFT",
        "uplift_dinov3_splus16",
        ("omegaconf", "torchvision"),
        options=(("include_extractor", False),),
        doublings=2,
        splus=True,
    ),
}


@functools.cache
def _load(preset: Preset, hub: str) -> nn.Module:
    missing = [package for package in preset.packages if find_spec(package) is None]
    folders = sorted(Path(hub).glob(preset.repository.replace("/", "_") + "_*/hubconf.py"))
    if missing or not folders:
        install = f"pip install {' '.join(missing)}; " if missing else ""
        options = "".join(f", {name}={value!r}" for name, value in preset.options)
        raise ImportError(
            f'The upsampler of {preset.repository} is not installed: {install}python -c "import torch; '
            f"torch.hub.load('{preset.repository}', '{preset.entry}', trust_repo=True{options})\""
        )
    loaded: Any = torch.hub.load(str(folders[0].parent), preset.entry, source="local", **dict(preset.options))
    if preset.doublings:
        loaded.enable_iterative(preset.doublings)
    return loaded.eval()


def is_splus(config: Any) -> bool:
    """Whether features are those of DINOv3 ViT-S+/16: 384 channels of patches of 16 pixels, from gated MLPs."""
    backbone = config.backbone_config
    size = (getattr(backbone, name, None) for name in ("hidden_size", "patch_size", "use_gated_mlp"))
    return config.readout == "dinov3" and tuple(size) == (384, 16, True)


def resolve_upsampler(upsampler: str | Upsampler | None, image_processor: Any, config: Any = None) -> Upsampler | None:
    """
    The upsampler called `"anyup"`, `"naf"` or `"uplift"`, which takes images normalised by `image_processor` and features of
    a model of this configuration; a callable or `None` as it is.

    Raises:
        ValueError: an unknown name, neither a name nor a callable, or one that was trained for other features.
        ImportError: its code or a package that it needs is not installed; the message says how to.
    """
    if upsampler is None or callable(upsampler):
        return upsampler
    if upsampler not in PRESETS:
        raise ValueError(
            f"Unknown upsampler {upsampler!r}; use one of {sorted(PRESETS)} or a callable "
            "`(image, features) -> features` (`spar_hf/model/upsamplers.py`)."
        )
    preset = PRESETS[upsampler]
    if preset.splus and not is_splus(config):
        others = sorted(name for name, other in PRESETS.items() if not other.splus)
        raise ValueError(
            f"The upsampler {upsampler!r} is published for features of DINOv3 ViT-S+/16, not of this model "
            f"({config.readout}, {config.projection_dim} channels). Take one of {others}, which take any features."
        )
    model = preset.load()
    statistics = (*IMAGENET, image_processor.image_mean, image_processor.image_std)

    def upsample(image: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        mean, std, old_mean, old_std = (image.new_tensor(values).view(-1, 1, 1) for values in statistics)
        size = {"output_size": tuple(side * preset.factor for side in features.shape[-2:])}
        image = (image * old_std + old_mean - mean) / std
        return model.to(features.device)(image, features, **({} if preset.doublings else size))

    return upsample


__all__ = ["PRESETS", "Preset", "Upsampler", "resolve_upsampler", "upsampled_features"]
