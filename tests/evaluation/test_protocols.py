"""Published evaluations: their settings, and their background rules against a plain computation."""

import torch
from torch.nn import functional as F

from spar_hf.evaluation.candidates import Rules
from spar_hf.evaluation.inference import decide_as_published
from spar_hf.evaluation.protocols import Protocol, find_protocol, spar
from spar_hf.model.prompts import Vocabulary


def test_protocol__settings_of_the_published_evaluation():
    assert spar("voc21", "siglip").scale == 65 and spar("voc21", "siglip").threshold == 0
    assert (spar("voc21", "maskclip").threshold, spar("voc21", "maskclip").min_area) == (0.1, 0.1)
    assert (spar("context60", "siglip").scale, spar("context60", "siglip").threshold) == (50, 0.1)
    assert spar("cityscapes", "siglip").size == {"shortest_edge": 1024, "longest_edge": 2048}
    for name in ("voc20", "context59", "ade20k", "coco-object", "coco-stuff", None):
        protocol = spar(name, "maskclip")
        assert protocol.size == {"shortest_edge": 672, "longest_edge": 2048} and protocol.templates == "imagenet80"
        assert protocol.scale == 40 and not protocol.threshold
    assert spar("voc20", "siglip").vocabulary == "voc20-spar" and spar("ade20k", "siglip").vocabulary == "ade20k"
    assert find_protocol("spar", "voc21", "maskclip") == spar("voc21", "maskclip")
    # thresholds on the softmax over names are the published ones; without a protocol synonyms do not compete
    assert spar("context60", "siglip").scores == "names" and Protocol().scores == Rules().scores == "classes"
    assert find_protocol(None) == Protocol() and Protocol().size is None and Protocol().scale is None


def published_rules(logits, name_to_class, background, threshold, min_area):
    """Probabilities per class, the small ones' set to 0, the best that is left, then the threshold: `(height, width)`."""
    probabilities = logits.softmax(0)
    classes = range(int(name_to_class.max()) + 1)
    probabilities = torch.stack([probabilities[name_to_class == c].amax(0) for c in classes])
    won = torch.stack([probabilities.argmax(0) == c for c in classes]).sum((1, 2))
    won[background] = 0
    for c in classes:
        if c != background and won[c] <= min_area * won.sum():
            probabilities[c] = 0
    best, label = probabilities.max(0)
    return torch.where(best < threshold, background, label)


def test_background_rules_are_those_of_the_published_evaluation():
    def decided(logits, names, cell, threshold, min_area, working_bytes=2**26):
        vocabulary = Vocabulary.parse(names)
        size = tuple(cell * side for side in logits.shape[1:])
        rules = Rules(threshold=threshold, min_area=min_area, scores=spar("voc21", "maskclip").scores)
        return decide_as_published(logits, vocabulary, cell, size, size, rules, working_bytes).labels.long()

    # three pixels of a small class go to the next best one, and none of them to the background
    road, small = torch.tensor([0.1, 0.8, 0.1]), torch.tensor([0.1, 0.4, 0.5])
    logits = torch.stack([road] * 60 + [small] * 3, dim=1)[:, None].log()
    names = {"background": ["background"], "road": ["road"], "car": ["car"]}
    assert decided(logits, names, 1, 0.1, 0.1).tolist() == [[1] * 63]
    assert decided(logits, names, 1, 0.1, 0.0).tolist() == [[1] * 60 + [2] * 3]
    # what is left may be too little: then it is background
    assert decided(logits, names, 1, 0.41, 0.1).tolist() == [[1] * 60 + [0] * 3]

    # the background in the middle, several names for a class, tiles of a few pixels
    names = {
        "road": ["road", "street"],
        "car": ["car"],
        "background": ["wall", "floor"],
        "dog": ["dog"],
        "cat": ["cat"],
    }
    logits = torch.randn(7, 6, 9, generator=torch.Generator().manual_seed(0)) * 2
    logits += torch.tensor([1.0, 1, 1, 0.2, 0.2, -1, -0.5])[:, None, None]
    logits = F.interpolate(logits[None], scale_factor=5, mode="bilinear")[0]
    name_to_class = Vocabulary.parse(names).name_to_class
    plain = published_rules(logits, name_to_class, 2, 0, 0)
    for threshold, min_area in ((0.0, 0.12), (0.45, 0.12), (0.45, 0.0), (0.0, 0.6)):
        expected = published_rules(logits, name_to_class, 2, threshold, min_area)
        assert not torch.equal(expected, plain)
        for working_bytes in (3_000, 2**26):
            assert torch.equal(decided(logits, names, 1, threshold, min_area, working_bytes), expected)
