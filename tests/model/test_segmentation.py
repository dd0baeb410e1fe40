"""Decisions per pixel against a plain formula that computes all probabilities at once."""

import random

import pytest
import torch
from torch.nn import functional as F

from spar_hf.model.segmentation import LabelMap, class_probabilities, decide, give_to_background, upsampled_tiles


def best_of_classes(values, name_to_class):
    """The largest value of every class's names: `(names, …)` -> `(classes, …)`."""
    classes = int(name_to_class.max()) + 1
    return torch.stack([values[name_to_class == c].amax(0) for c in range(classes)])


def upsampled(logits, patch, working, output=None):
    """Upsample p-fold, crop the padding, resize to the image."""
    up = F.interpolate(logits[None], scale_factor=patch, mode="bilinear", align_corners=False)
    up = up[:, :, : working[0], : working[1]]
    if output not in (None, working):
        up = F.interpolate(up, size=output, mode="bilinear", align_corners=False)
    return up[0]


def plain(logits, name_to_class, patch, working, output):
    """The largest logit of each class's names, softmax over classes."""
    return best_of_classes(upsampled(logits, patch, working, output), name_to_class).softmax(0).max(0)


def published(logits, name_to_class, patch, working):
    """Softmax over names, then the maximum over the names of a class (SPAR, section 3)."""
    return best_of_classes(upsampled(logits, patch, working).softmax(0), name_to_class).max(0)


@pytest.mark.parametrize("size", [(64, 64), (65, 79), (200, 330), (17, 16), (3, 40)])
@pytest.mark.parametrize("working_bytes", [3_000, 50_000, 2**26])
def test_equals_the_plain_formula_at_the_working_size(size, working_bytes):
    grid = tuple(-(-side // 16) for side in size)
    logits = torch.randn(7, *grid, generator=torch.Generator().manual_seed(0)) * 4
    name_to_class = torch.tensor([0, 0, 1, 2, 2, 2, 3])
    decision = decide(logits, name_to_class, 16, size, size, working_bytes)
    probabilities, labels = plain(logits, name_to_class, 16, size, size)
    assert (decision.labels == labels).float().mean() > 0.999  # ties in the last bit
    torch.testing.assert_close(decision.probabilities, probabilities, atol=1e-5, rtol=0)


@pytest.mark.parametrize("output", [(400, 660), (100, 165), (211, 333)])
def test_close_to_the_two_step_formula_at_another_size(output):
    """Reading the patch grid directly differs from upsampling twice only by the second blur."""
    coarse = torch.randn(4, 4, 6, generator=torch.Generator().manual_seed(1)) * 8
    logits = F.interpolate(coarse[None], size=(13, 21), mode="bicubic")[0]
    decision = decide(logits, torch.arange(4), 16, (200, 330), output)
    _, labels = plain(logits, torch.arange(4), 16, (200, 330), output)
    assert decision.labels.shape == output
    assert (decision.labels == labels).float().mean() > 0.99


@pytest.mark.parametrize(("height", "width"), [(64, 96), (67, 101), (49, 80)])
def test_an_edge_stays_where_it_is_at_any_size(height, width):
    """Two classes split at a patch border: the decision changes exactly there, whatever is padded on the right."""
    grid = (-(-height // 16), -(-width // 16))
    logits = torch.zeros(2, *grid)
    logits[0, :, :2], logits[1, :, 2:] = 10, 10
    labels = decide(logits, torch.arange(2), 16, (height, width), (height, width)).labels
    assert (labels[:, :32] == 0).all() and (labels[:, 32:] == 1).all()


def test_image_twice_the_working_size_has_the_edge_at_twice_the_place():
    logits = torch.zeros(2, 4, 6)
    logits[0, :, :2], logits[1, :, 2:] = 10, 10
    labels = decide(logits, torch.arange(2), 16, (61, 90), (122, 180)).labels
    assert (labels[:, :64] == 0).all() and (labels[:, 64:] == 1).all()


def test_scores_are_mean_probabilities_over_the_mask():
    logits = torch.randn(3, 5, 5, generator=torch.Generator().manual_seed(2)) * 5
    decision = decide(logits, torch.arange(3), 16, (80, 80), (80, 80))
    pixels, scores = decision.class_scores(4)
    for label in range(3):
        mask = decision.labels == label
        assert int(pixels[label]) == int(mask.sum())
        assert float(scores[label]) == pytest.approx(float(decision.probabilities[mask].mean()), abs=1e-5)
    assert pixels[3] == 0 and scores[3] == 0


def test_a_grid_of_another_image_is_refused():
    with pytest.raises(ValueError, match="5×5 patches"):
        decide(torch.zeros(2, 4, 4), torch.arange(2), 16, (80, 80), (80, 80))


def test_unsure_pixels_and_tiny_classes_become_background():
    labels = torch.tensor([[0, 0, 0, 1], [1, 1, 2, 0], [0, 0, 3, 1]], dtype=torch.int32)  # class 3 is the background
    sure = torch.tensor([[0.9, 0.9, 0.9, 0.4], [0.9, 0.9, 0.9, 0.9], [0.9, 0.9, 0.2, 0.9]])
    found = give_to_background(LabelMap(labels.clone(), sure.clone()), 3, threshold=0.5)
    assert found.labels.tolist() == [[0, 0, 0, 3], [1, 1, 2, 0], [0, 0, 3, 1]]
    assert found.probabilities[0, 3] == pytest.approx(0.6) and found.probabilities[2, 2] == pytest.approx(0.2)
    # of the ten pixels outside the background class 2 has one, class 1 three
    found = give_to_background(LabelMap(labels.clone(), sure.clone()), 3, threshold=0.5, min_area=0.11)
    assert found.labels.tolist() == [[0, 0, 0, 3], [1, 1, 3, 0], [0, 0, 3, 1]]
    everything = give_to_background(LabelMap(labels.clone(), sure.clone()), 3, threshold=1.0)
    assert (everything.labels == 3).all()
    with pytest.raises(ValueError, match="0 to 1"):
        give_to_background(LabelMap(labels, sure), 3, threshold=40)


NAMES = torch.tensor([0, 0, 1, 2, 2, 2, 3])


def test_five_hundred_label_maps_are_those_of_the_plain_formula_in_float64():
    """
    Odd sizes, synonyms, excluded classes, and names of equal logits, of which the first wins. Only pixels whose two best
    classes differ by less than float32 can tell are left out.
    """
    generator, draw, pixels, unclear = torch.Generator().manual_seed(0), random.Random(0), 0, 0
    for case in range(500):
        patch, size = draw.choice((4, 7, 14, 16)), (draw.randint(1, 40), draw.randint(1, 40))
        names = draw.choice((1, 2, 5, 9, 70))
        name_to_class = torch.randint(0, draw.randint(1, names), (names,), generator=generator)
        grid = tuple(-(-side // patch) for side in size)
        logits = torch.randn(names, *grid, generator=generator) * draw.choice((0.1, 3, 30))
        if names > 2 and case % 3 == 0:
            logits[names // 2] = logits[0]
        classes = int(name_to_class.max()) + 1
        excluded = torch.rand(classes, generator=generator) < 0.3
        excluded[name_to_class[draw.randrange(names)]] = False
        excluded = excluded if case % 4 == 0 else None
        exact = upsampled(logits.double(), patch, size)
        if excluded is not None:
            exact = exact.masked_fill(excluded[name_to_class][:, None, None], -torch.inf)
        name = exact.argmax(0)
        rival = exact.masked_fill(name_to_class[:, None, None] == name_to_class[name], -torch.inf).amax(0)
        equal = (exact == exact.amax(0)).sum(0) > 1  # in float64: the first name wins there too
        clear = (exact.amax(0) - rival > 1e-5 * logits.abs().max()) | equal
        found = decide(logits, name_to_class, patch, size, size, excluded=excluded).labels
        assert torch.equal(found[clear], name_to_class[name][clear].int()), case
        pixels, unclear = pixels + clear.numel(), unclear + int((~clear).sum())
    assert pixels > 150_000 and unclear < 1e-4 * pixels


def test_a_synonym_that_wins_nowhere_changes_nothing():
    logits = torch.randn(4, 5, 6, generator=torch.Generator().manual_seed(9)) * 3
    geometry = (16, (75, 90), (75, 90))
    alone = decide(logits, torch.arange(4), *geometry)
    together = torch.cat([logits, logits[1:2] - 0.01, logits[1:2] - 2])
    names = torch.tensor([0, 1, 2, 3, 1, 1])
    found = decide(together, names, *geometry)
    assert torch.equal(found.labels, alone.labels) and torch.equal(found.probabilities, alone.probabilities)
    torch.testing.assert_close(
        class_probabilities(together, names, *geometry), class_probabilities(logits, torch.arange(4), *geometry)
    )
    as_published = decide(together, names, *geometry, scores="names")
    assert torch.equal(as_published.labels, alone.labels)
    assert float(as_published.probabilities[alone.labels == 1].mean()) < 0.7 * float(
        alone.probabilities[alone.labels == 1].mean()
    )


@pytest.mark.parametrize("working_bytes", [2_000, 2**26])
def test_scores_of_names_are_those_of_the_published_formula(working_bytes):
    logits = torch.randn(7, 5, 6, generator=torch.Generator().manual_seed(7)) * 3
    probabilities, labels = published(logits, NAMES, 16, (75, 90))
    found = decide(logits, NAMES, 16, (75, 90), (75, 90), working_bytes, scores="names")
    assert torch.equal(found.labels, labels.int())
    torch.testing.assert_close(found.probabilities, probabilities, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="scores"):
        decide(logits, NAMES, 16, (75, 90), (75, 90), scores="words")


@pytest.mark.parametrize("working_bytes", [2_000, 2**26])
def test_excluded_classes_win_nothing_and_keep_their_share(working_bytes):
    logits = torch.randn(7, 5, 6, generator=torch.Generator().manual_seed(7)) * 3
    left = best_of_classes(upsampled(logits, 16, (75, 90)), NAMES).softmax(0)
    excluded = torch.tensor([False, True, True, False])
    left[excluded] = 0
    found = decide(logits, NAMES, 16, (75, 90), (75, 90), working_bytes, excluded)
    assert torch.equal(found.labels, left.argmax(0).int())
    torch.testing.assert_close(found.probabilities, left.amax(0), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("working_bytes", "output"), [(2_000, (67, 90)), (9_000, (150, 31)), (2**26, (67, 90))])
def test_rows_of_logits_on_request_give_the_same_and_never_more_than_fit(working_bytes, output):
    logits = torch.randn(7, 9, 6, generator=torch.Generator().manual_seed(3)) * 4
    asked = []

    def rows(first, last):
        asked.append(last - first)
        return logits[:, first:last]

    expected = decide(logits, NAMES, 16, (140, 90), output)
    decision = decide(rows, NAMES, 16, (140, 90), output, working_bytes)
    assert torch.equal(decision.labels, expected.labels)
    torch.testing.assert_close(decision.probabilities, expected.probabilities)
    assert max(asked) == min(9, max(2, working_bytes // (4 * 7 * 6)))


def test_no_tile_is_larger_than_the_working_bytes():
    """With twenty thousand names, one row of a wide image exceeds the bound."""
    logits = torch.randn(20_000, 2, 3, generator=torch.Generator().manual_seed(4))
    geometry = (16, (32, 48), (8, 700), torch.device("cpu"), 4 * 2**20)
    covered = torch.zeros(8, 700)
    for place, pixels in upsampled_tiles(logits, 20_000, *geometry):
        assert pixels.numel() * 4 <= 4 * 2**20
        covered[place] += 1
    assert (covered == 1).all()


@pytest.mark.parametrize("name_to_class", [NAMES, torch.arange(7), torch.tensor([3, 1, 0, 2, 6, 5, 4])])
@pytest.mark.parametrize("working_bytes", [5_000, 2**26])
def test_class_probabilities_equal_the_plain_formula(name_to_class, working_bytes):
    logits = torch.randn(7, 5, 6, generator=torch.Generator().manual_seed(5)) * 3
    expected = best_of_classes(upsampled(logits, 16, (75, 90)), name_to_class).softmax(0)
    geometry = (16, (75, 90), (75, 90))
    classes, found = class_probabilities(logits, name_to_class, *geometry, working_bytes=working_bytes)
    assert classes.tolist() == list(range(len(expected)))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    top, probabilities = class_probabilities(logits, name_to_class, *geometry, top_k=3, working_bytes=working_bytes)
    assert top.shape == (3, 75, 90)
    torch.testing.assert_close(probabilities, expected.topk(3, 0).values, atol=1e-5, rtol=0)
    torch.testing.assert_close(expected.gather(0, top.long()), probabilities, atol=1e-5, rtol=0)
    torch.testing.assert_close(found.sum(0), torch.ones(75, 90))
    everything, _ = class_probabilities(logits, name_to_class, *geometry, top_k=99)
    assert len(everything) == len(expected)


def test_a_class_without_names_has_probability_0():
    logits = torch.randn(3, 2, 2, generator=torch.Generator().manual_seed(8))
    name_to_class = torch.tensor([3, 0, 3], dtype=torch.int32)  # none of classes 1 and 2
    classes, found = class_probabilities(logits, name_to_class, 16, (32, 32), (32, 32))
    expected = torch.stack([logits[1], torch.maximum(logits[0], logits[2])])
    assert classes.tolist() == [0, 1, 2, 3] and (found[1:3] == 0).all()
    torch.testing.assert_close(found[[0, 3]][:, ::31, ::31], expected.softmax(0), atol=1e-6, rtol=0)  # the corners


def test_probabilities_too_large_for_memory_are_refused_before_any_work():
    with pytest.raises(ValueError, match=r'1000 classes at 2048×2048 pixels take 15\.6 GiB.*output="map"'):
        class_probabilities(torch.zeros(1000, 2, 2), torch.arange(1000), 16, (32, 32), (2048, 2048))


def test_background_rules_on_an_image_of_many_strips_equal_the_rules_on_the_whole():
    generator = torch.Generator().manual_seed(6)
    labels = torch.randint(0, 5, (2100, 1030), generator=generator, dtype=torch.int32)
    labels[labels == 1] = torch.where(torch.rand(int((labels == 1).sum()), generator=generator) < 0.02, 1, 0).int()
    sure = torch.rand(2100, 1030, generator=generator)
    found = give_to_background(LabelMap(labels.clone(), sure.clone()), 2, threshold=0.3, min_area=0.01)
    expected = torch.where(sure < 0.3, 2, labels)
    share = (expected == 1).sum() / (expected != 2).sum()
    assert 0 < share < 0.01
    expected[expected == 1] = 2
    assert torch.equal(found.labels, expected.int())
    torch.testing.assert_close(found.probabilities, torch.where(expected != labels, 1 - sure, sure))
    pixels, scores = found.class_scores(5)
    for label in range(5):
        mask = found.labels == label
        assert int(pixels[label]) == int(mask.sum())
        if pixels[label]:
            assert float(scores[label]) == pytest.approx(float(found.probabilities[mask].double().mean()), abs=1e-5)
