"""Published evaluations: their settings, and their background rules against a plain computation."""

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import make_tokenizer
from torch.nn import functional as F

from spar_hf import SparImageProcessorPil
from spar_hf.evaluation import command as script
from spar_hf.evaluation.candidates import Candidate, Rules
from spar_hf.evaluation.inference import decide_as_published
from spar_hf.evaluation.protocols import Protocol, find_protocol, spar
from spar_hf.model.prompts import Vocabulary
from spar_hf.utils.errors import UsageError


def test_protocol__settings_of_the_published_evaluation():
    assert spar("voc21", "siglip").scale == 65 and spar("voc21", "siglip").threshold == 0
    assert (spar("voc21", "maskclip").threshold, spar("voc21", "maskclip").min_area) == (0.1, 0.1)
    assert (spar("context60", "siglip").scale, spar("context60", "siglip").threshold) == (50, 0.1)
    assert spar("cityscapes", "siglip").size == {"shortest_edge": 1024, "longest_edge": 2048}
    for name in ("voc20", "context59", "ade20k", "coco-object", "coco-stuff", None):
        protocol = spar(name, "maskclip")
        assert protocol.size == {"shortest_edge": 672, "longest_edge": 2048} and protocol.templates == "imagenet80"
        assert protocol.scale == 40 and not protocol.threshold
    assert spar("voc20", "siglip").vocabulary == "voc20-spar" and spar("ade20k", "siglip").vocabulary == "ade20k-spar"
    assert (
        spar("coco-stuff", "siglip").vocabulary == "coco-stuff" and spar("bdd100k", "siglip").vocabulary == "cityscapes"
    )
    for readout, window in {"siglip": None, "maskclip": None, "dinov3": 384, "dinov3txt": 384}.items():
        assert (spar("voc20", readout).window_size, spar(None, readout).resample) == (window, "bilinear")
    assert find_protocol("spar", "voc21", "maskclip") == spar("voc21", "maskclip")
    # thresholds on the softmax over names are the published ones; without a protocol synonyms do not compete
    assert spar("context60", "siglip").scores == "names" and Protocol().scores == Rules().scores == "classes"
    assert find_protocol(None) == Protocol() and Protocol().size is None and Protocol().scale is None


# the published names of ADE20K where they are not those of the set, from the paper's code
TOGETHER = [
    "chestofdrawers",
    "pooltable",
    "screendoor",
    "coffeetable",
    "kitchenisland",
    "swivelchair",
    "arcademachine",
    "televisionreceiver",
    "dirttrack",
    "conveyerbelt",
    "swimmingpool",
    "tradename",
    "trafficlight",
    "crtscreen",
    "bulletinboard",
]


def test_published_names_of_ade20k():
    ours, published = (Vocabulary.parse(name).labels for name in ("ade20k", "ade20k-spar"))
    differing = [name for own, name in zip(ours, published, strict=True) if own != name]
    assert differing == TOGETHER and len(TOGETHER) == 15
    assert "streetlight" in published and published[:3] == ("wall", "building", "sky")


# bilinear without antialiasing, as OpenCV resizes, against plain torch


@pytest.mark.parametrize(
    "size", [{"shortest_edge": 40}, {"shortest_edge": 150, "longest_edge": 160}, {"height": 33, "width": 64}]
)
def test_images_are_resized_as_published(size):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 123, 3), dtype=np.uint8))
    processor = SparImageProcessorPil(size={"shortest_edge": 96})
    candidate = Candidate(None, processor, None, {"do_resize": True, "size": size}, resample="bilinear")
    ours = candidate.pixel_values(image)
    levels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float()
    plain = F.interpolate(levels, size=ours.shape[-2:], mode="bilinear", align_corners=False, antialias=False).round()
    torch.testing.assert_close(ours, plain / 255 / 0.5 - 1, atol=1.01 / 255 / 0.5, rtol=0)  # ties may round either way
    assert (ours - (plain / 255 / 0.5 - 1)).abs().gt(1e-4).float().mean() < 0.01
    candidate.resample = "bicubic"
    smooth = candidate.pixel_values(image)
    assert smooth.shape == ours.shape and (smooth - ours).abs().mean() > 0.01
    candidate.resample = None  # as the image processor has it
    torch.testing.assert_close(candidate.pixel_values(image), smooth)


def test_size_of_the_folder_and_native_size_are_kept():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 123, 3), dtype=np.uint8))
    processor = SparImageProcessorPil(size={"shortest_edge": 60})
    for resample in ("bilinear", "bicubic", None):
        assert Candidate(None, processor, None, resample=resample).pixel_values(image).shape == (1, 3, 60, 82)
    native = Candidate(None, processor, None, {"do_resize": False}, resample="bilinear").pixel_values(image)
    torch.testing.assert_close(native, processor(image, do_resize=False, return_tensors="pt")["pixel_values"])


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


def make_context(root):
    for name, value in (("2008_000002", 0), ("2008_000003", 41)):
        for path, image in (
            (root / "JPEGImages" / f"{name}.jpg", Image.effect_noise((60, 40), 90).convert("RGB")),
            (root / "SegmentationClassContext" / f"{name}.png", Image.new("L", (60, 40), value)),
        ):
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path)
    listing = root / "ImageSets" / "SegmentationContext" / "val.txt"
    listing.parent.mkdir(parents=True)
    listing.write_text("2008_000002\n2008_000003\n")


def test_protocol__benchmark_and_overrides(tmp_path, checkpoint):
    make_context(tmp_path / "VOC2010")
    command = ["--dataset", str(tmp_path), "--benchmark", "context60", "--protocol", "spar", "--no_warmup"]
    base = checkpoint("base")
    make_tokenizer(letters=True).save_pretrained(base)  # tells all 60 classes apart
    command += ["--model", f"base={base}", "--templates", "plain"]
    report = script.main([*command, "--shortest_edge", "48"])
    assert (report["title"], report["dataset"], report["split"]) == ("PASCAL Context", "context60", "val")
    assert report["vocabulary"]["potted plant"] == ("pottedplant",)
    row = report["runs"][0]
    assert (row["scale"], row["threshold"], row["min_area"]) == (50, 0.1, 0)
    assert row["resize"] == {"do_resize": True, "size": {"shortest_edge": 48}}
    assert (row["resample"], row["window_size"]) == ("bilinear", None)
    labelled = {label: entry["labelled_pixels"] for label, entry in row["classes"].items() if entry["labelled_pixels"]}
    assert labelled == {"background": 2400, "road": 2400}
    # 60 alike names: no probability reaches a half
    sure = script.main([*command, "--shortest_edge", "48", "--threshold", "0.5", "--dense_logit_scale", "1"])["runs"][0]
    assert sure["classes"]["background"]["predicted_pixels"] == 4800
    published = script.main([*command, "--limit", "1", "--dense_logit_scale", "30"])["runs"][0]
    assert published["resize"] == {"do_resize": True, "size": {"shortest_edge": 672, "longest_edge": 2048}}
    assert published["scale"] == 30
    smooth = script.main([*command, "--shortest_edge", "48", "--resample", "bicubic"])["runs"][0]
    assert smooth["resample"] == "bicubic"
    assert script.main([*command, "--limit", "1", "--native"])["runs"][0]["resample"] is None
    with pytest.raises(UsageError, match="--native resizes nothing: leave out --resample bicubic"):
        script.main([*command, "--native", "--resample", "bicubic"])
    with pytest.raises(UsageError, match="no protocol 'sparr'; use one of spar"):
        script.main([*command, "--protocol", "sparr"])
