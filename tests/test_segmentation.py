"""Decisions per pixel against the plain formula that holds every probability at once."""

import pytest
import torch
from torch.nn import functional as F

from spar_hf.segmentation import LabelMap, decide, give_to_background


def plain(logits, name_to_class, patch, working, output):
    """Upsample p-fold, crop the padding, resize to the photo, softmax over names, maximum per class."""
    up = F.interpolate(logits[None], scale_factor=patch, mode="bilinear", align_corners=False)
    up = up[:, :, : working[0], : working[1]]
    if output != working:
        up = F.interpolate(up, size=output, mode="bilinear", align_corners=False)
    probabilities = up[0].softmax(0)
    classes = int(name_to_class.max()) + 1
    best = torch.stack([probabilities[name_to_class == c].amax(0) for c in range(classes)])
    return best.max(0)


@pytest.mark.parametrize("size", [(64, 64), (65, 79), (200, 330), (17, 16), (3, 40)])
@pytest.mark.parametrize("working_bytes", [1, 50_000, 2**26])
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


def test_photo_twice_the_working_size_has_the_edge_at_twice_the_place():
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


def test_a_grid_of_another_photo_is_refused():
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
