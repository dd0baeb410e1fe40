"""Images in tiles: plans, exact blending, decisions block by block, windows of arrays and images."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.nn import functional as F
from transformers import pipeline

from spar_hf import SparImageProcessorPil
from spar_hf.model.image_input import read_rgb
from spar_hf.model.image_windows import ImageWindows
from spar_hf.model.prompts import Vocabulary
from spar_hf.model.segmentation import decide
from spar_hf.model.tiling import TileAxis, TilePlan, blended_blocks, decided_blocks, tile_sides

LABELS = ["road", "car, automobile", "sky"]


@st.composite
def plans(draw):
    patch = draw(st.sampled_from([4, 7, 8]))
    tile = draw(st.integers(patch, 6 * patch))
    overlap = draw(st.integers(0, tile - 1))
    size = draw(st.tuples(st.integers(2, 90), st.integers(2, 90)))
    return TilePlan.make(size, patch, tile, overlap)


@settings(max_examples=60, deadline=None)
@given(plans())
def test_tiles_cover_the_image_and_their_weights_sum_to_one(plan):
    for axis, side in zip((plan.rows, plan.columns), plan.size, strict=True):
        assert axis.length == -(-side // plan.patch_size)
        total = torch.zeros(axis.length)
        for start, weights in zip(axis.starts, axis.weights, strict=True):
            assert (weights > 0).all()
            total[start : start + axis.tile] += weights
        assert torch.allclose(total, torch.ones(axis.length), atol=1e-6)
        assert axis.starts[0] == 0 and axis.starts[-1] + axis.tile == axis.length
        assert all(a < b <= a + axis.tile for a, b in zip(axis.starts, axis.starts[1:], strict=False))
    windows = [plan.window(i, j) for i in range(len(plan.rows)) for j in range(len(plan.columns))]
    assert max(bottom for _, _, bottom, _ in windows) == plan.size[0]
    assert max(right for *_, right in windows) == plan.size[1]


def tile_features(plan, dim=3, seed=0):
    """Other features for each tile, by window."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = plan.rows, plan.columns
    return {
        plan.window(i, j): torch.randn(dim, rows.tile, columns.tile, generator=generator)
        for i in range(len(rows))
        for j in range(len(columns))
    }


def plain_blend(plan, features):
    """The definition, all in memory: the root of the distance to the border over each overlap, divided by the sum."""

    def ramp(axis, k):
        cells = np.arange(axis.tile) + 0.5
        weights = np.ones(axis.tile)
        if k > 0:
            shared = axis.starts[k - 1] + axis.tile - axis.starts[k]
            weights *= np.sqrt(np.minimum(cells / max(shared, 1e-9), 1))
        if k + 1 < len(axis.starts):
            shared = axis.starts[k] + axis.tile - axis.starts[k + 1]
            left = axis.tile - cells
            weights *= np.sqrt(np.minimum(left / max(shared, 1e-9), 1))
        return weights

    total = np.zeros((len(next(iter(features.values()))), plan.rows.length, plan.columns.length))
    norm = np.zeros(total.shape[1:])
    for i, top in enumerate(plan.rows.starts):
        for j, left in enumerate(plan.columns.starts):
            weights = np.outer(ramp(plan.rows, i), ramp(plan.columns, j))
            place = (slice(top, top + plan.rows.tile), slice(left, left + plan.columns.tile))
            total[:, *place] += features[plan.window(i, j)].numpy() * weights
            norm[place] += weights
    return torch.from_numpy(total / norm).float()


@settings(max_examples=40, deadline=None)
@given(plans())
def test_blocks_are_the_plain_blend_with_a_margin(plan):
    features = tile_features(plan)
    expected = plain_blend(plan, features)
    seen = torch.zeros(expected.shape[1:])
    for rows, columns, block in blended_blocks(plan, lambda *window: features[window]):
        above, beside = int(rows.start > 0), int(columns.start > 0)
        part = expected[:, rows.start - above : rows.stop, columns.start - beside : columns.stop]
        assert torch.allclose(block, part, atol=1e-5)
        seen[rows, columns] += 1
    assert (seen == 1).all()


@settings(max_examples=25, deadline=None)
@given(plans())
def test_decisions_are_those_of_the_blended_image(plan):
    features = tile_features(plan)
    name_to_class = torch.tensor([0, 1, 1])
    whole = decide(plain_blend(plan, features), name_to_class, plan.patch_size, plan.size, plan.size)
    seen = torch.zeros(plan.size)
    encode = features.__getitem__
    for rows, columns, block in decided_blocks(plan, lambda *window: encode(window), lambda f: f, name_to_class):
        assert (block.labels == whole.labels[rows, columns]).float().mean() > 0.97  # ties by rounding
        assert torch.allclose(block.probabilities, whole.probabilities[rows, columns], atol=1e-5)
        seen[rows, columns] += 1
    assert (seen == 1).all()


def test_features_that_depend_on_pixels_alone_are_not_changed_by_tiles():
    """Means of patches, and a constant: every plan gives back the untiled feature map."""
    image = torch.rand(3, 83, 131, generator=torch.Generator().manual_seed(0))
    padded = F.pad(image, (0, 5, 0, 5))
    whole = F.avg_pool2d(padded, 8)
    plan = TilePlan.make((83, 131), 8, 40, 16)

    def encode(top, left, bottom, right):
        window = image[:, top:bottom, left:right]
        missing = (-window.shape[1] % 8, -window.shape[2] % 8)
        return torch.cat([F.avg_pool2d(F.pad(window, (0, missing[1], 0, missing[0])), 8), torch.ones(1, *grid(window))])

    def grid(window):
        return tuple(-(-side // 8) for side in window.shape[1:])

    for rows, columns, block in blended_blocks(plan, encode):
        part = block[:, -(rows.stop - rows.start) :, -(columns.stop - columns.start) :]
        assert torch.allclose(part[:3], whole[:, rows, columns], atol=1e-6)
        assert torch.allclose(part[3], torch.ones(()), atol=1e-6)


def test_blocks_come_as_soon_as_their_tiles_are_there():
    plan = TilePlan.make((128, 128), 8, 48, 16)
    features, asked = tile_features(plan), []

    def encode(*window):
        asked.append(window)
        return features[window]

    blocks = blended_blocks(plan, encode)
    for n in range(len(plan)):
        next(blocks)
        assert len(asked) == n + 1


@pytest.mark.parametrize(
    ("tile", "word"),
    [
        ({"size": 64, "overlap": 64}, "overlap"),
        ({"size": 64, "overlap": -1}, "overlap"),
        ({"size": 8}, "patch"),
        ({"size": 31}, "patch"),  # the last tile could be one pixel wide
        ({"size": 64.0}, "tile"),
        ({"size": True}, "tile"),
        ({"overlap": 8}, "tile"),
        ({"size": 64, "stride": 8}, "tile"),
        ("64", "tile"),
        (4096, "max_tokens"),
    ],
)
def test_impossible_tiles_are_refused(tile, word):
    with pytest.raises(ValueError, match=word):
        tile_sides(tile, 16, 16_384)


def test_sides_are_rounded_to_patches():
    axis = TilePlan.make((1000, 1000), 14, 300, 50).rows
    assert axis.tile == 21  # 300 / 14, rounded down
    assert min(a + 21 - b for a, b in zip(axis.starts, axis.starts[1:], strict=False)) >= 4  # 50 / 14, rounded up
    assert TileAxis.make(5, 21, 4) == TileAxis(5, 5, (0,))


# --- windows ---

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (40, 50, 3), dtype=np.uint8)


def read_everywhere(windows):
    """An image put together from windows of uneven sizes."""
    height, width = windows.size
    out = np.zeros((height, width, 3))
    for top in range(0, height, 13):
        for left in range(0, width, 17):
            bottom, right = min(top + 13, height), min(left + 17, width)
            out[top:bottom, left:right] = windows.read(top, left, bottom, right)
    return out


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "1", "CMYK", "I;16", "F"])
def test_windows_of_pillow_images_are_windows_of_the_converted_image(mode, tmp_path):
    if mode == "I;16":
        image = Image.fromarray(RGB[:, :, 0].astype(np.uint16) * 257)
    elif mode == "F":
        image = Image.fromarray(RGB[:, :, 0].astype(np.float32) / 255)
    else:
        image = Image.fromarray(np.dstack([RGB, RGB[:, :, :1]]), "RGBA" if mode == "RGBA" else None).convert(mode)
    found, whole = read_everywhere(ImageWindows(image)), np.asarray(SparImageProcessorPil().process_image(image))
    assert np.array_equal(found, np.moveaxis(whole, 0, 2).astype(float))


def test_orientation_is_applied_and_files_are_read(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(RGB).save(tmp_path / "turned.png", exif=exif)
    found = ImageWindows(tmp_path / "turned.png")
    assert found.size == (50, 40)
    assert np.array_equal(read_everywhere(found), np.asarray(read_rgb(tmp_path / "turned.png")))


class Lazy:
    """An array on a disk: it has no other operation than slicing, and notes what was read."""

    def __init__(self, array):
        self.array, self.shape, self.dtype, self.reads = array, array.shape, array.dtype, []

    def __getitem__(self, window):
        self.reads.append(self.array[window].size)
        return self.array[window]


def test_only_the_window_of_an_array_is_read():
    lazy = Lazy(RGB)
    windows = ImageWindows(lazy)
    assert np.array_equal(windows.read(5, 10, 15, 40), RGB[5:15, 10:40]) and lazy.reads == [900]


def test_sixteen_bits_are_checked_over_the_whole_image_and_scaled_alike_in_every_window():
    values = RNG.integers(0, 9000, (40, 50), dtype=np.uint16)
    with pytest.raises(ValueError, match="image_range"):
        ImageWindows(Lazy(values))
    values[-1, -1] = 60_000  # one bright pixel shows that all bits are used, also for dark windows
    dark = ImageWindows(Lazy(values)).read(0, 0, 10, 10)
    assert dark.dtype == np.uint8 and np.array_equal(dark[:, :, 0], (values[:10, :10].astype(int) + 128) // 257)


def test_a_stated_range_holds_in_windows_that_lie_outside_of_it():
    values = np.tile(np.linspace(0, 4095, 50), (40, 1)).astype(np.uint16)
    values[:10] = 60_000  # no data
    windows = ImageWindows(Lazy(values), (0, 4095))
    assert (windows.read(0, 0, 10, 50) == 1).all()
    assert np.allclose(windows.read(20, 0, 30, 50)[:, :, 0], values[20:30] / 4095, atol=1e-6)
    with pytest.raises(ValueError, match="image_range"):
        ImageWindows(Lazy(values), (0, 1))


@pytest.mark.parametrize("source", [np.zeros((4, 5, 6, 3), np.uint8), Lazy(np.zeros((3, 40, 50))), object()])
def test_what_has_no_windows_is_refused(source):
    with pytest.raises(ValueError, match="shape"):
        ImageWindows(source)


# --- in the pipeline ---


def test_one_tile_is_the_untiled_image(segment, picture):
    rules = {"candidate_labels": LABELS, "background": "other", "threshold": 0.3, "min_area": 0.2, "output": "map"}
    one = segment(picture, tile={"size": 144, "overlap": 32}, **rules)
    plain = segment(picture, size="native", **rules)
    assert np.array_equal(one["map"], plain["map"]) and one["labels"] == plain["labels"]
    assert np.allclose(one["scores"], plain["scores"])


def test_tiles_are_those_of_the_definition(segment, picture, two_towers):
    """Other windows, features of each by the model, blended by the definition, decided at once."""
    plan = TilePlan.make((90, 131), 16, 64, 32)
    pixels = segment.image_processor(picture, size="native", return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        features = {
            window: two_towers.vision_model(pixels[:, :, window[0] : window[2], window[1] : window[3]]).feature_map[0]
            for window in (plan.window(i, j) for i in range(len(plan.rows)) for j in range(len(plan.columns)))
        }
    vocabulary = Vocabulary.parse(LABELS)
    with torch.no_grad():
        logits = two_towers.dense_logits(plain_blend(plan, features)[None], segment.text_embeds(vocabulary))[0]
    whole = decide(logits, vocabulary.name_to_class, 16, (90, 131), (90, 131))
    found = segment(picture, candidate_labels=LABELS, tile={"size": 64, "overlap": 32}, output="map")
    assert (found["map"] == whole.labels.numpy()).mean() > 0.999
    lazy = ImageWindows(Lazy(np.asarray(picture)))
    for other in segment([lazy, picture], candidate_labels=LABELS, tile={"size": 64, "overlap": 32}, output="map"):
        assert np.array_equal(other["map"], found["map"])
    masks = segment(np.asarray(picture), candidate_labels=LABELS, tile={"size": 64, "overlap": 32})
    assert sum((np.asarray(part["mask"]) == 255).astype(int) for part in masks).min() == 1


@pytest.mark.parametrize(
    "options",
    [
        {"size": {"shortest_edge": 64}},
        {"output": "probabilities"},
        {"output": "logits"},
        {"output": "map", "top_k": 2},
        {"refine": "pamr"},
        {"presence": True},
        {"max_tokens": 4},
        {"tile": {"size": 64, "overlap": 64}},
    ],
)
def test_options_that_contradict_tiles_are_refused(segment, picture, options):
    with pytest.raises(ValueError, match=r"[tT]ile"):
        segment(picture, candidate_labels=LABELS, **{"tile": 64, **options})


@pytest.mark.parametrize("shape", [(1, 90), (90, 1), (1, 1)])
def test_an_image_of_one_row_is_refused_with_its_own_size(segment, shape):
    with pytest.raises(ValueError, match=f"{shape[0]} × {shape[1]} pixels.*at least 2"):
        segment(Image.new("RGB", shape[::-1]), candidate_labels=LABELS, tile=64, output="map")


def test_encoding_in_tiles_is_refused(two_towers, tokenizer, picture):
    parts = {"model": two_towers, "tokenizer": tokenizer, "image_processor": SparImageProcessorPil()}
    segment = pipeline("open-vocab-segmentation", tile=64, **parts)
    assert segment(picture, candidate_labels=LABELS, output="map")["map"].shape == (90, 131)
    with pytest.raises(ValueError, match="tile"):
        segment.encode(picture)
