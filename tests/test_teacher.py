"""The teacher against a slow, plain formula with loops and slices."""

import itertools
from functools import partial

import numpy as np
import pytest
import torch
from tiny_models import BLOCKS, randomise, tiny_config
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F
from transformers import Tipsv2VisionConfig

from spar_hf import SlidingWindowTeacher, SparVisionModel
from spar_hf.model.modeling_spar import SparVisionModelOutput
from spar_hf.windows import WindowPlan, window_starts


@torch.no_grad()
def slow_teacher(model, image, window, stride, patch=16):
    """Features of one image `(1, 3, H, W)`: one window at a time."""
    image = F.pad(image, (0, -image.shape[3] % patch, 0, -image.shape[2] % patch))
    height, width = image.shape[2:]
    win_h, win_w = min(window, height), min(window, width)
    r = next(r for r in range(1, patch + 1) if patch % r == 0 and stride % (patch // r) == 0)
    cell = patch // r
    total = torch.zeros(1, model.config.projection_dim, height // cell, width // cell)
    count = torch.zeros(1, 1, height // cell, width // cell)
    tops, lefts = [], []
    for starts, length, side in ((tops, height, win_h), (lefts, width, win_w)):
        position = 0
        while position + side < length:
            starts.append(position)
            position += stride
        starts.append(length - side)
    for top, left in itertools.product(tops, lefts):
        features = model(image[:, :, top : top + win_h, left : left + win_w]).feature_map
        if r > 1:
            features = F.interpolate(features, scale_factor=r, mode="bilinear", align_corners=False)
        rows = slice(top // cell, (top + win_h) // cell)
        columns = slice(left // cell, (left + win_w) // cell)
        total[:, :, rows, columns] += features
        count[:, :, rows, columns] += 1
    stitched = total / count
    return stitched if r == 1 else F.interpolate(stitched, size=(height // patch, width // patch), mode="bilinear")


@pytest.mark.parametrize("stride", [8, 16, 24, 40, 64, 7])
def test_equals_the_slow_formula(vision_model, stride):
    image = torch.randn(1, 3, 112, 144)
    teacher = SlidingWindowTeacher(vision_model, stride=stride, window_batch_size=5)
    torch.testing.assert_close(
        teacher(image).feature_map, slow_teacher(vision_model, image, 64, stride), atol=2e-5, rtol=0
    )


@pytest.mark.parametrize("window, stride", [(56, None), (56, 24), (70, 42), (42, 14)])
def test_equals_the_slow_formula_with_patches_of_14(window, stride):
    """Windows that are no multiple of 16; by default every one and a half patches."""
    torch.manual_seed(0)
    config = tiny_config(text_config=None, backbone_config=Tipsv2VisionConfig(image_size=56, patch_size=14, **BLOCKS))
    model = randomise(SparVisionModel(config))
    image, teacher = torch.randn(1, 3, 113, 150), SlidingWindowTeacher(model, window, stride)
    assert stride is not None or teacher.stride == 21
    expected = slow_teacher(model, image, window, teacher.stride, patch=14)
    torch.testing.assert_close(teacher(image).feature_map, expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("size", [(64, 64), (40, 50), (16, 200), (3, 3), (71, 65), (200, 30)])
def test_any_size_gives_the_grid_of_a_single_pass(vision_model, size):
    image = torch.randn(1, 3, *size)
    features = SlidingWindowTeacher(vision_model, stride=24)(image).feature_map
    with torch.no_grad():
        assert features.shape == vision_model(image).feature_map.shape
    torch.testing.assert_close(features, slow_teacher(vision_model, image, 64, 24), atol=2e-5, rtol=0)


def test_one_window_is_one_pass(vision_model):
    image = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = vision_model(image).feature_map
    torch.testing.assert_close(
        SlidingWindowTeacher(vision_model, stride=64)(image).feature_map, expected, atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("window_batch_size", [1, 7, 1000])
def test_several_images_share_batches_and_stay_apart(vision_model, window_batch_size):
    images = torch.randn(3, 3, 90, 120)
    teacher = SlidingWindowTeacher(vision_model, stride=24, window_batch_size=window_batch_size)
    singles = torch.cat([slow_teacher(vision_model, image[None], 64, 24) for image in images])
    torch.testing.assert_close(teacher(images).feature_map, singles, atol=2e-5, rtol=0)


def test_never_runs_more_windows_at_once_than_allowed(vision_model):
    seen = []
    hook = vision_model.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[0]))
    SlidingWindowTeacher(vision_model, stride=24, window_batch_size=4)(torch.randn(2, 3, 112, 112))
    hook.remove()
    assert max(seen) == 4 and sum(seen) == 2 * 9


def test_progress_counts_every_window_and_no_gradient_flows(vision_model):
    calls = []
    image = torch.randn(2, 3, 112, 112, requires_grad=True)
    teacher = SlidingWindowTeacher(vision_model, stride=24, window_batch_size=4)
    features = teacher(image, progress=lambda done, total: calls.append((done, total))).feature_map
    assert calls == [(4, 18), (8, 18), (12, 18), (16, 18), (18, 18)]
    assert not features.requires_grad


def test_half_precision_sums_in_float32(vision_model):
    image = torch.randn(1, 3, 112, 144)
    expected = slow_teacher(vision_model, image, 64, 24)
    features = SlidingWindowTeacher(vision_model.bfloat16(), stride=24)(image).feature_map
    assert features.dtype == torch.float32
    assert F.cosine_similarity(features, expected, dim=1).min() > 0.99


@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])
def test_a_precision_of_its_own_needs_a_copy_and_is_kept_under_autocast(vision_model, autocast):
    before = {name: p.clone() for name, p in vision_model.named_parameters()}
    teacher = SlidingWindowTeacher(vision_model, stride=32, window_batch_size=1, dtype=torch.bfloat16)
    assert {p.dtype for p in teacher.model.parameters()} == {torch.bfloat16} and not teacher.model.training
    assert not any(p.requires_grad for p in teacher.model.parameters())
    image = torch.randn(1, 3, 112, 144)
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        features = teacher(image).feature_map
    expected = slow_teacher(teacher.model, image, 64, 32)  # sums in float32
    torch.testing.assert_close(features, expected, atol=2e-5, rtol=0)
    assert F.cosine_similarity(features, slow_teacher(vision_model, image, 64, 32), dim=1).min() > 0.99
    assert all(torch.equal(p, before[name]) for name, p in vision_model.named_parameters())
    trained = [name for name, p in vision_model.named_parameters() if p.requires_grad]
    assert len(trained) > 20  # and the model in training is not frozen


def test_full_precision_under_autocast_needs_no_copy(vision_model):
    teacher = SlidingWindowTeacher(vision_model, stride=24, dtype=torch.float32)
    assert teacher.model is vision_model
    image = torch.randn(1, 3, 112, 144)
    expected = teacher(image).feature_map
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(teacher(image).feature_map, expected)


def test_offloaded_weights_have_no_copy(vision_model):
    with pytest.raises(ValueError, match="offloaded"):
        SlidingWindowTeacher(vision_model.to("meta"), dtype=torch.bfloat16)


def test_compiles_once_for_all_images(monkeypatch):
    """Square windows and others, other numbers of them, a single one: all share a graph."""
    torch._dynamo.reset()
    backend = CompileCounterWithBackend("eager")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    config = tiny_config(text_config=None)
    config.backbone_config.num_hidden_layers = 1  # a layer is compiled as two are
    model = randomise(SparVisionModel(config))
    teacher = SlidingWindowTeacher(model, stride=24, window_batch_size=4, compile=True)
    assert teacher.state_dict().keys() == SlidingWindowTeacher(model).state_dict().keys()
    for size in ((112, 144), (64, 64), (40, 50)):
        image = torch.randn(1, 3, *size)
        torch.testing.assert_close(teacher(image).feature_map, slow_teacher(model, image, 64, 24), atol=2e-5, rtol=0)
    assert backend.frame_count == 1


@pytest.mark.parametrize("size", [(112, 144), (71, 100)])
def test_several_sizes_and_the_mirror_image_are_averaged_on_the_patches_of_the_image(vision_model, size):
    """Against one plain teacher per view, read at the centres of the image's patches pixel by pixel."""
    image = torch.randn(1, 3, *size)
    padded = F.pad(image, (0, -size[1] % 16, 0, -size[0] % 16))
    plain = SlidingWindowTeacher(vision_model, stride=24)
    small = F.interpolate(image, [round(side / 2) for side in size], mode="bicubic", antialias=True)
    half = plain(small).feature_map[0]

    def read(row, column):
        """The half-sized map at the centre of a patch, by hand."""
        value, places = 0, []
        for place, side, cells in zip((row, column), size, half.shape[1:], strict=True):
            position = ((place + 0.5) * 16 * round(side / 2) / side) / 16 - 0.5
            position = min(max(position, 0), cells - 1)
            low = int(position)
            places.append([(low, 1 - position + low), (min(low + 1, cells - 1), position - low)])
        for (y, a), (x, b) in itertools.product(*places):
            value = value + a * b * half[:, y, x]
        return value

    full = plain(image).feature_map
    rows, columns = full.shape[-2:]
    expected = torch.stack([torch.stack([read(y, x) for x in range(columns)], -1) for y in range(rows)], -2)[None]
    found = SlidingWindowTeacher(vision_model, stride=24, scales=(1, 0.5))(image).feature_map
    torch.testing.assert_close(found, (full + expected) / 2, atol=1e-4, rtol=0)
    torch.testing.assert_close(plain(image, scales=(1, 0.5)).feature_map, found)  # of one batch
    mirrored = SlidingWindowTeacher(vision_model, stride=24, flip=True)(image).feature_map
    expected = (full + plain(padded.flip(-1)).feature_map.flip(-1)) / 2
    torch.testing.assert_close(mirrored, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"window_size": 70}, "use 64"), ({"stride": 0}, "between 1"), ({"stride": 65}, "pixels are missed"),
     ({"window_batch_size": 0}, "at least 1"), ({"scales": ()}, "positive"), ({"scales": (1, -0.5)}, "positive")],
)  # fmt: skip
def test_bad_settings_are_refused(vision_model, options, message):
    with pytest.raises(ValueError, match=message):
        SlidingWindowTeacher(vision_model, **options)


def test_scales_of_one_batch_are_those_that_it_is_given(vision_model):
    """Instead of the teacher's own, for the full map and for drawn windows."""
    image = torch.randn(1, 3, 112, 128)
    teacher = SlidingWindowTeacher(vision_model, stride=24, scales=(0.5, 0.25))
    for scales in ((1.0,), (0.75, 1.5)):
        other = SlidingWindowTeacher(vision_model, stride=24, scales=scales)
        torch.testing.assert_close(teacher(image, scales=scales).feature_map, other(image).feature_map)
        drawn = [
            which.sample(image, 3, torch.Generator().manual_seed(5), **given)
            for which, given in ((teacher, {"scales": scales}), (other, {}))
        ]
        for found, expected in zip(*drawn, strict=True):
            torch.testing.assert_close(found, expected)
    assert teacher.scales == (0.5, 0.25)
    for refused in ((), (1, 0)):
        with pytest.raises(ValueError, match="positive factors"):
            teacher(image, scales=refused)


def test_numbers_of_numpy_are_whole_and_others_refused(vision_model, two_towers):
    assert SlidingWindowTeacher(vision_model, stride=np.int64(32)).stride == 32
    for options in ({"stride": 32.0}, {"window_size": "64"}, {"window_batch_size": 1.5}):
        (name,) = options
        with pytest.raises(ValueError, match=f"{name}=.* must be a whole number"):
            SlidingWindowTeacher(vision_model, **options)
    with pytest.raises(ValueError, match=r"`model\.vision_model` of the SparForOpenVocabSegmentation"):
        SlidingWindowTeacher(two_towers)


@pytest.mark.parametrize(("length", "stride"), [(64, 24), (100, 24), (112, 24), (113, 7), (30, 24)])
def test_windows_start_at_zero_end_flush_and_leave_no_gap(length, stride):
    starts = window_starts(length, 64, stride)
    assert starts[0] == 0 and starts[-1] == max(0, length - 64)
    assert all(0 < b - a <= stride for a, b in itertools.pairwise(starts))


# --- the sampled estimate -------------------------------------------------------------------------------------------


def every_draw(plan, windows, variant, monkeypatch):
    """Every result of `plan.draw` with its probability, by enumerating the random numbers."""
    if variant == "spread":
        # the draw changes with the random point only where the point passes the border of a stretch
        borders = {0.0, 1.0, *(plan.chances(windows)[1].cumsum(0) % 1).tolist()}
        for low, high in itertools.pairwise(sorted(borders)):
            middle = torch.tensor((low + high) / 2, dtype=torch.float64)
            monkeypatch.setattr(torch, "rand", lambda *args, value=middle, **kwargs: value)
            yield high - low
    else:
        sizes = []
        monkeypatch.setattr(torch, "randperm", lambda n, generator=None: sizes.append(n) or torch.arange(n))
        drawn = len(plan.draw(windows, variant=variant).positions)
        groups = sizes[0]
        drawn = drawn if variant == "windows" else min(groups, max(1, round(windows * groups / len(plan))))
        subsets = list(itertools.combinations(range(groups), drawn))
        for chosen in subsets:
            rest = [i for i in range(groups) if i not in chosen]
            order = torch.tensor([*chosen, *rest])
            monkeypatch.setattr(torch, "randperm", lambda n, generator=None, order=order: order)
            yield 1 / len(subsets)


# sides whose last windows are clamped; strides that divide the patch, that do not, and that make odd gaps; a thin image
GRIDS = [((112, 128), 24), ((96, 112), 16), ((80, 144), 40), ((48, 160), 20), ((64, 64), 24)]


@pytest.mark.parametrize("variant", ["tiling", "windows", "spread"])
@pytest.mark.parametrize(("size", "stride"), GRIDS)
@pytest.mark.parametrize("windows", [1, 3])
def test_draws_are_unbiased_on_every_cell(size, stride, windows, variant, monkeypatch):
    """The mean over every possible draw, for any features: weights are 1 and weighted targets the mean over all windows."""
    plan = WindowPlan.make(*size, 64, stride, 16)
    features = torch.randn(len(plan), *plan.cells, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    number = {tuple(position): i for i, position in enumerate(plan.positions().tolist())}

    def lay(positions, weights):
        total, count = torch.zeros(2, *plan.grid, dtype=torch.float64)
        for (top, left), weight in zip(positions.tolist(), weights.tolist(), strict=True):
            rows, columns = slice(top, top + plan.cells[0]), slice(left, left + plan.cells[1])
            total[rows, columns] += weight * features[number[top, left]]
            count[rows, columns] += weight
        return total, count

    total, count = lay(plan.positions(), torch.ones(len(plan)))
    full = total / count
    mean_weight, mean_target, chance_in_all = torch.zeros_like(full), torch.zeros_like(full), 0.0
    for chance in every_draw(plan, windows, variant, monkeypatch):
        draw = plan.draw(windows, variant=variant)
        total, count = lay(draw.positions, draw.window_weights)
        assert ((count > 0) == (draw.cell_weights > 0)).all()
        mean_weight += chance * draw.cell_weights
        mean_target += chance * draw.cell_weights * torch.where(count > 0, total / count, 0)
        chance_in_all += chance
    assert chance_in_all == pytest.approx(1, abs=1e-12)
    torch.testing.assert_close(mean_weight, torch.ones_like(full), atol=1e-10, rtol=0)
    torch.testing.assert_close(mean_target, full, atol=1e-10, rtol=0)


@pytest.mark.parametrize("variant", ["tiling", "windows", "spread"])
@pytest.mark.parametrize(("size", "stride", "windows"), [((112, 128), 24, 1), ((96, 112), 16, 2), ((80, 144), 40, 3)])
def test_sampled_gradient_is_unbiased_over_all_draws(vision_model, monkeypatch, size, stride, windows, variant):
    """The mean of the sampled gradient over all possible draws equals the full teacher's gradient."""
    image = torch.randn(1, 3, *size)
    teacher = SlidingWindowTeacher(vision_model, stride=stride)
    full = teacher(image).feature_map
    student = torch.randn_like(full, requires_grad=True)
    expected = torch.autograd.grad((student - full).square().sum(), student)[0]
    mean = torch.zeros_like(full)
    for chance in every_draw(teacher.plan(*size), windows, variant, monkeypatch):
        target, weight = teacher.sample(image, windows, variant=variant)
        r = target.shape[-1] // student.shape[-1]
        cells = student.repeat_interleave(r, 2).repeat_interleave(r, 3)
        mean += chance * torch.autograd.grad((weight * (cells - target).square()).sum(), student)[0]
    torch.testing.assert_close(mean, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("variant", ["tiling", "windows", "spread"])
def test_sampled_gradient_is_unbiased_over_views_too(vision_model, monkeypatch, variant):
    """The same where one of several sizes, perhaps mirrored, is drawn with the windows."""
    image = torch.randn(1, 3, 112, 128)
    teacher = SlidingWindowTeacher(vision_model, stride=24, scales=(1, 0.75), flip=True)
    full = teacher(image).feature_map
    student = torch.randn_like(full, requires_grad=True)
    expected = torch.autograd.grad((student - full).square().sum(), student)[0]
    mean = torch.zeros_like(full)
    for number, view in enumerate(teacher.views):
        monkeypatch.setattr(torch, "randint", lambda *args, number=number, **kwargs: torch.tensor(number))
        for chance in every_draw(teacher.plan(*teacher.view(image, view).shape[-2:]), 2, variant, monkeypatch):
            target, weight = teacher.sample(image, 2, variant=variant)
            r = target.shape[-1] // student.shape[-1]
            cells = student.repeat_interleave(r, 2).repeat_interleave(r, 3)
            gradient = torch.autograd.grad((weight * (cells - target).square()).sum(), student)[0]
            mean += chance / len(teacher.views) * gradient
    torch.testing.assert_close(mean, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("variant", ["tiling", "windows", "spread"])
def test_sampling_everything_is_the_full_teacher(vision_model, variant):
    image = torch.randn(1, 3, 112, 128)
    teacher = SlidingWindowTeacher(vision_model, stride=16)
    target, weight = teacher.sample(image, windows=10_000, variant=variant)
    torch.testing.assert_close(target, teacher(image).feature_map, atol=1e-5, rtol=0)
    torch.testing.assert_close(weight, torch.ones_like(weight), atol=1e-6, rtol=0)


@pytest.mark.parametrize(("variant", "windows"), [("tilings", 4), ("windows", 0)])
def test_an_impossible_draw_is_refused(vision_model, variant, windows):
    with pytest.raises(ValueError, match="spread, tiling, windows"):
        SlidingWindowTeacher(vision_model).sample(torch.zeros(1, 3, 64, 64), windows, variant=variant)


@pytest.mark.parametrize("variant", ["windows", "spread"])
def test_a_draw_costs_the_windows_asked_for(variant):
    plan = WindowPlan.make(384, 512, 192, 24, 16)
    generator = torch.Generator().manual_seed(0)
    for windows in (1, 7, 20, 134, 200):
        positions = [plan.draw(windows, generator, variant).positions for _ in range(5)]
        assert {len(p) for p in positions} == {min(windows, len(plan))}
        assert all(len(p.unique(dim=0)) == len(p) for p in positions)


def test_tiles_do_not_overlap():
    plan = WindowPlan.make(384, 512, 192, 24, 16)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        draw = plan.draw(1, generator, "tiling")
        assert plan.coverage(draw.positions, draw.window_weights).max() == 1


def test_tilings_cost_about_the_windows_asked_for():
    plan = WindowPlan.make(384, 512, 192, 24, 16)
    generator = torch.Generator().manual_seed(0)
    counts = [len(plan.draw(20, generator, "tiling").positions) for _ in range(200)]
    assert len(plan) == 135
    assert len(set(counts)) > 1 and abs(sum(counts) / len(counts) - 20) < 1.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision_counts_windows_exactly(vision_model, monkeypatch, dtype):
    """If all windows are equal, so are all means; rounded counts would change them."""
    ones = torch.ones(1, 32, 4, 4)
    monkeypatch.setattr(
        type(vision_model),
        "forward",
        lambda self, x: SparVisionModelOutput(feature_map=ones.expand(len(x), -1, -1, -1)),
    )
    teacher = SlidingWindowTeacher(vision_model, stride=8)
    image = torch.zeros(1, 3, 112, 144)
    with torch.autocast("cpu", dtype):
        full = teacher(image).feature_map
        target, weight = teacher.sample(image, 12, torch.Generator().manual_seed(0))
    torch.testing.assert_close(full, torch.ones_like(full), atol=1e-5, rtol=0)
    drawn = weight > 0
    torch.testing.assert_close(target[0, :, drawn], torch.ones_like(target[0, :, drawn]), atol=1e-5, rtol=0)
    assert drawn.float().mean() > 0.1
