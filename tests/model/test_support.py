"""Support images: corrections against autograd and plain formulas, and what they do to the pipeline."""

import copy
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch.nn import functional as F
from transformers import pipeline
from transformers.utils.logging import warning_once

from spar_hf.model.corrections import PENALTIES, choose_penalty, evenly, fit_corrections, patch_iou
from spar_hf.model.fingerprints import vision_fingerprint
from spar_hf.model.prompts import Vocabulary
from spar_hf.model.segmentation import decide
from spar_hf.model.support import PATCHES, SupportSet, example_of, mask_shares


@pytest.fixture
def halves():
    """An image of two textures, left and right, and the mask of its right half."""
    rng = np.random.default_rng(0)
    image = np.full((96, 160, 3), 40, np.uint8)
    image[:, 80:] = rng.integers(0, 256, (96, 80, 3))
    mask = np.zeros((96, 160), bool)
    mask[:, 80:] = True
    return Image.fromarray(image), mask


def made_patches(images=6, patches=12, dim=8, words=0.0, seed=0):
    """Unit features of two classes about two directions, half of each image each, and logits that say `words` of it."""
    rng = torch.Generator().manual_seed(seed)
    classes = torch.arange(patches).remainder(2).repeat(images)
    centres = F.normalize(torch.randn(2, dim, generator=rng), dim=-1)
    features = F.normalize(centres[classes] + 0.2 * torch.randn(len(classes), dim, generator=rng), dim=-1)
    logits = torch.zeros(len(classes), 2) + words * F.one_hot(classes, 2)
    return features, classes, logits, torch.arange(images).repeat_interleave(patches)


def test_corrections_minimise_the_loss_that_is_documented():
    generator = torch.Generator().manual_seed(1)
    features = F.normalize(torch.randn(40, 6, generator=generator), dim=-1)
    classes, logits = torch.randint(0, 3, (40,), generator=generator), 3 * torch.randn(40, 4, generator=generator)

    def loss(corrections):
        entropy = F.cross_entropy(logits.double() + features.double() @ corrections.T, classes)
        return 3 * entropy + 0.05 * corrections.square().sum()  # 3 of the 4 classes have patches

    found = fit_corrections(features, classes, logits, penalty=0.1).double().requires_grad_()
    (slope,) = torch.autograd.grad(loss(found), found)
    assert float(slope.abs().max()) < 1e-3
    # Newton's method from another start
    flat = torch.ones(24, dtype=torch.float64)
    for _ in range(20):
        gradient = torch.func.grad(lambda x: loss(x.view(4, 6)))(flat)
        flat = flat - torch.linalg.solve(torch.func.hessian(lambda x: loss(x.view(4, 6)))(flat), gradient)
    torch.testing.assert_close(found.detach(), flat.view(4, 6), atol=2e-2, rtol=0)


def test_words_that_are_right_and_sure_are_left_alone():
    features, classes, logits, _ = made_patches(words=40.0)
    assert float(fit_corrections(features, classes, logits, penalty=0.1).abs().max()) < 1e-6


def test_the_images_are_trusted_where_they_say_more_than_the_words():
    features, classes, logits, images = made_patches(words=-3.0)  # the words say the contrary
    assert choose_penalty(features, classes, logits, images) < PENALTIES[0]
    noise = F.normalize(torch.randn(len(classes), 8, generator=torch.Generator().manual_seed(3)), dim=-1)
    right = 2.0 * F.one_hot(classes, 2)
    assert choose_penalty(noise, classes, right, images) == PENALTIES[0]  # the features say nothing


def test_images_of_one_and_the_same_number_cannot_choose():
    features, classes, logits, images = made_patches(images=1)
    assert choose_penalty(features, classes, logits, images) == PENALTIES[0]


def test_iou_of_patches_is_that_of_the_definition():
    found, classes = torch.tensor([0, 0, 1, 2, 2, 1]), torch.tensor([0, 1, 1, 1, 2, 2])
    assert patch_iou(found, classes) == pytest.approx((1 / 2 + 1 / 4 + 1 / 3) / 3)


def test_shares_of_a_mask_on_the_grid():
    mask = np.zeros((40, 72), np.uint8)
    mask[10:37, 5:50] = 3
    padded = np.zeros((48, 80))
    padded[:40, :72] = mask > 0
    expected = padded.reshape(3, 16, 5, 16).mean((1, 3))
    np.testing.assert_allclose(mask_shares(mask, (40, 72), (40, 72), 16), expected, atol=1e-6)
    # the working image is half as large: the same shares on a grid of patches twice as large
    halved = mask_shares(np.kron(mask, np.ones((2, 2), np.uint8)), (80, 144), (40, 72), 16)
    np.testing.assert_allclose(halved, expected, atol=1e-6)


@pytest.mark.parametrize("kind", ["array", "tensor", "mode 1", "mode L", "mode P", "file"])
def test_a_mask_in_any_form_is_the_same(halves, kind, tmp_path):
    mask = halves[1]
    picture = Image.fromarray(mask.astype(np.uint8) * 200)
    picture.save(tmp_path / "mask.png")
    indices = Image.fromarray(mask.astype(np.uint8), "P")
    forms = {"array": mask, "tensor": torch.from_numpy(mask), "mode 1": Image.fromarray(mask), "mode L": picture}
    forms |= {"mode P": indices, "file": tmp_path / "mask.png"}
    shares = mask_shares(forms[kind], (96, 160), (96, 160), 16)
    assert shares.tolist() == [[0.0] * 5 + [1.0] * 5] * 6


@pytest.mark.parametrize("kind", ["scores", "nan", "ignored", "label map", "jpeg"])
def test_a_mask_has_one_value_inside(kind):
    """What has several was read as one class, however little of it was meant."""
    mask = np.zeros((64, 64))
    mask[:32] = 1
    given = {
        "scores": np.linspace(0.1, 0.9, 64 * 64).reshape(64, 64),
        "nan": np.where(mask > 0, 1, np.nan),
        "ignored": (mask + 254 * np.eye(64)).astype(np.uint8),
        "label map": Image.fromarray((mask + 3).astype(np.uint8)),
        "jpeg": Image.fromarray(np.where(mask > 0, 255, np.arange(64) % 3).astype(np.uint8)),
    }[kind]
    with pytest.raises(ValueError, match=r"several.*`label_map == number`"):
        mask_shares(given, (64, 64), (64, 64), 16)
    assert mask_shares(7.5 * mask, (64, 64), (64, 64), 16).sum() == 8


def test_at_most_so_many_patches_of_a_mask_are_kept_and_at_least_one(segment, halves):
    image, mask = halves
    large = segment.encode(image, size={"shortest_edge": 256})
    assert example_of(large, mask, 16, "cat", 0).features.shape == (PATCHES, 32)
    dot = np.zeros_like(mask)
    dot[50:53, 90:93] = True
    (feature,) = example_of(segment.encode(image), dot, 16, "cat", 0).features
    grid = segment.encode(image).feature_map
    expected = F.normalize(grid[:, int(51.5 * 80 / 96) // 16, int(91.5 * 80 / 96) // 16], dim=0)
    torch.testing.assert_close(feature.float(), expected, atol=1e-3, rtol=0)
    assert evenly(torch.arange(5), 9).tolist() == [0, 1, 2, 3, 4] and evenly(torch.arange(9), 3).tolist() == [0, 4, 8]


def test_an_annotated_image_is_segmented_as_it_was_annotated(segment, halves):
    image, mask = halves
    segment.support.penalty = 0.003
    assert segment.add_support([(image, mask, "cat"), (image, ~mask, "sky")]) == {"cat": 1, "sky": 1}
    found = segment(image, candidate_labels=["sky", "cat", "road"], output="map")["map"]
    assert ((found == 1) == mask).mean() > 0.95 and ((found == 0) == ~mask).mean() > 0.95
    segment.clear_support()
    plain = segment(image, candidate_labels=["sky", "cat", "road"], output="map")["map"]
    assert (plain != found).mean() > 0.2


def test_logits_are_those_of_words_and_corrections(segment, halves):
    image, mask = halves
    words = ["sky, grass", "cat", "road"]
    plain = segment(image, candidate_labels=words, output="logits")
    segment.support.penalty = 0.1
    segment.add_support([(image, mask, "grass")])  # another name of the class
    found = segment(image, candidate_labels=words, output="logits")
    features = F.normalize(segment.encode(image).feature_map, dim=0)
    classes = torch.zeros(len(segment.support.examples[0].features), dtype=torch.int64)
    kept = segment.support.examples[0].features.float()
    embeds = segment.text_embeds(Vocabulary.parse(words))
    of_names = segment.model.config.dense_logit_scale * kept @ embeds.T
    of_classes = torch.stack([of_names[:, :2].amax(1), of_names[:, 2], of_names[:, 3]], 1)
    corrections = fit_corrections(kept, classes, of_classes, 0.1)[[0, 0, 1, 2]]
    expected = plain["logits"] + torch.einsum("dhw,nd->nhw", features, corrections).numpy()
    np.testing.assert_allclose(found["logits"], expected, atol=1e-3)
    assert np.abs(found["logits"] - plain["logits"]).max() > 0.1
    where = (found["patch_size"], found["working_size"], found["original_size"])
    decided = decide(torch.from_numpy(found["logits"]), torch.from_numpy(found["name_to_class"]), *where)
    assert np.array_equal(segment(image, candidate_labels=words, output="map")["map"], decided.labels)


@pytest.mark.parametrize("options", [{"tile": 192}, {"refine": "pamr"}, {"min_presence": 0.0}, {"batch_size": 2}])
def test_they_count_in_every_way_to_segment(segment, halves, options):
    image, mask = halves
    segment.support.penalty = 0.003
    segment.add_support([(image, mask, "cat"), (image, ~mask, "sky")], size="native")
    (found, _) = segment(
        [image, image], candidate_labels=["sky", "cat", "road"], output="map",
        **({} if "tile" in options else {"size": "native"}), **options,
    )  # fmt: skip
    assert ((found["map"] == 1) == mask).mean() > 0.9
    (frame,) = segment.stream([image], ["sky", "cat", "road"], output="map", size="native")
    assert ((frame["map"] == 1) == mask).mean() > 0.9


def test_a_pipeline_of_tiles_reads_support_images_in_one_pass(segment, halves):
    image, mask = halves
    parts = {"tokenizer": segment.tokenizer, "image_processor": segment.image_processor}
    tiled = pipeline("open-vocab-segmentation", model=segment.model, tile=192, **parts)
    tiled.support.penalty = 0.003
    tiled.add_support([(image, mask, "cat"), (image, ~mask, "sky")], size="native")
    found = tiled(image, candidate_labels=["sky", "cat", "road"], output="map")
    assert ((found["map"] == 1) == mask).mean() > 0.9
    with pytest.raises(ValueError, match="in tiles are not kept"):
        tiled.encode(image)


def test_the_background_has_examples_like_a_class(segment, halves):
    image, mask = halves
    segment.support.penalty = 0.003
    segment.add_support([(image, mask, "cat"), (image, ~mask, "background")])
    found = segment(image, candidate_labels=["cat", "road"], background=["sky", "tree"], output="map")
    assert ((found["map"] == found["background"]) == ~mask).mean() > 0.95


def test_an_image_is_encoded_once_for_all_of_its_masks(segment, halves, monkeypatch):
    image, mask = halves
    calls = []
    encode = segment._encode
    monkeypatch.setattr(segment, "_encode", lambda *args: calls.append(1) or encode(*args))
    segment.add_support([(image, mask, "cat"), (image, ~mask, "sky"), (image.copy(), mask, "cat")])
    assert len(calls) == 2 and [example.image for example in segment.support.examples] == [0, 0, 1]


def test_an_open_file_may_stand_between_others(segment, halves, tmp_path):
    image, mask = halves
    image.save(tmp_path / "a.png")
    with (tmp_path / "a.png").open("rb") as file:
        segment.add_support([(file, mask, "cat"), (image, mask, "cat"), (file, ~mask, "sky")])
    assert [example.image for example in segment.support.examples] == [0, 1, 0]


def test_saved_support_gives_the_same_masks_in_another_process(segment, two_towers, tokenizer, halves, tmp_path):
    image, mask = halves
    segment.support.penalty = 0.01
    segment.add_support([(image, mask, "cat"), (image, ~mask, "sky")])
    segment.save_support(tmp_path / "cats.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["cats.safetensors"]
    expected = segment(image, candidate_labels=["sky", "cat", "road"], output="map")["map"]
    other = type(segment)(two_towers, tokenizer=tokenizer, image_processor=segment.image_processor)
    other.support.penalty = 0.01
    assert other.load_support(tmp_path / "cats.safetensors") == {"cat": 1, "sky": 1}
    assert np.array_equal(other(image, candidate_labels=["sky", "cat", "road"], output="map")["map"], expected)
    assert other.load_support(tmp_path / "cats.safetensors") == {"cat": 2, "sky": 2}  # added to what is there
    assert {example.image for example in other.support.examples} == {0, 1}
    other.clear_support("cat")
    assert other.support.counts() == {"sky": 2}


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        (["dog.jpg"], "list of triples"),
        ([(Image.new("RGB", (32, 32)), np.ones((32, 32)), " ")], "must be a word"),
        ([(Image.new("RGB", (32, 32)), np.ones((32, 30)), "cat")], r"support image 0, 'cat'.*shape \(32, 30\)"),
        ([(Image.new("RGB", (32, 32)), np.zeros((32, 32)), "cat")], "empty"),
        ([(Image.new("RGB", (32, 32)), Image.new("RGB", (32, 32)), "cat")], "one channel"),
        ([([Image.new("RGB", (32, 32))] * 2, np.ones((32, 32)), "cat")], "several images"),
    ],
)
def test_bad_examples_are_refused_and_nothing_is_added(segment, halves, examples, message):
    segment.add_support([(*halves, "sky")])
    with pytest.raises(ValueError, match=f"(?i){message}"):
        segment.add_support([(*halves, "cat"), *examples] if "list" in message else examples)
    assert segment.support.counts() == {"sky": 1}


def test_support_of_other_classes_is_refused_or_named(segment, halves, caplog):
    warning_once.cache_clear()
    image, mask = halves
    segment.add_support([(image, mask, "cat")])
    with pytest.raises(ValueError, match="None of the classes is one with support images: cat"):
        segment(image, candidate_labels=["road", "sky"])
    segment.add_support([(image, ~mask, "Sky")])  # as the names of classes: whatever the case
    segment(image, candidate_labels=["road", "sky"])
    assert any("take no part: cat" in message for message in caplog.messages)
    with pytest.raises(ValueError, match="no support images of 'dog'"):
        segment.clear_support("dog")


def test_another_vision_tower_is_refused(segment, halves, tmp_path):
    image, mask = halves
    segment.add_support([(image, mask, "cat")])
    segment.save_support(tmp_path / "cats.safetensors")
    with torch.no_grad():
        next(segment.model.vision_model.parameters()).add_(0.1)
    for act in (lambda: segment(image, candidate_labels=["cat", "sky"]), lambda: segment.add_support([])):
        with pytest.raises(ValueError, match="vision tower has changed"):
            act()
    with pytest.raises(ValueError, match="another vision tower"):
        segment.load_support(tmp_path / "cats.safetensors")


def test_files_that_are_none(segment, tmp_path):
    with pytest.raises(FileNotFoundError, match="save_support"):
        segment.load_support(tmp_path / "nowhere.safetensors")
    (tmp_path / "text.safetensors").write_text("no tensors")
    save_file({"features": torch.zeros(1, 32)}, tmp_path / "other.safetensors")
    for name, message in (("text", "not a safetensors file"), ("other", "no support images")):
        with pytest.raises(ValueError, match=message):
            segment.load_support(tmp_path / f"{name}.safetensors")
    with pytest.raises(ValueError, match="no support images to save"):
        segment.save_support(tmp_path / "none.safetensors")
    with pytest.raises(OSError, match="none"):
        segment.add_support([(Image.new("RGB", (32, 32)), np.ones((32, 32)), "cat")])
        segment.save_support(tmp_path / "none" / "none.safetensors")


def test_a_file_holds_features_and_no_pixels(segment, halves, tmp_path):
    image, mask = halves
    segment.add_support([(image, mask, "cat")])
    segment.save_support(tmp_path / "cats.safetensors")
    with safe_open(tmp_path / "cats.safetensors", framework="pt") as file:
        assert list(file.keys()) == ["features"] and file.get_tensor("features").dtype == torch.float16
        assert {"format", "labels", "images", "patches", "fingerprint"} == set(file.metadata())


def test_the_order_of_the_triples_of_two_images_is_no_matter(segment, picture, halves):
    """One image must not vouch for itself, however the list is sorted."""
    image, mask = halves
    other = Image.fromarray(np.ascontiguousarray(np.asarray(image)[::-1]))
    triples = [
        (picture_, part, label) for picture_ in (image, other) for part, label in ((mask, "road"), (~mask, "sky"))
    ]
    numbers, chosen = [], []
    for order in ([0, 1, 2, 3], [0, 2, 1, 3]):
        segment.add_support([triples[i] for i in order])
        numbers.append([segment.support.examples[order.index(i)].image for i in range(4)])
        segment(picture, candidate_labels=["road", "sky"])
        chosen.append(segment.support.chosen)
        segment.clear_support()
    assert numbers == [[0, 0, 1, 1], [0, 0, 1, 1]] and chosen[0] == chosen[1]


def test_paths_and_arrays_stand_beside_each_other(segment, halves, tmp_path):
    image, mask = halves
    image.save(tmp_path / "a.png")
    triples = [
        (np.asarray(image), mask, "road"),
        (tmp_path / "a.png", ~mask, "sky"),
        (str(tmp_path / "a.png"), mask, "road"),
    ]
    assert segment.add_support(triples) == {"road": 2, "sky": 1}
    assert [example.image for example in segment.support.examples] == [0, 1, 1]


def test_support_of_a_changed_tower_is_not_saved(segment, halves, tmp_path):
    """A file would carry the features of the old tower under the name of the new one."""
    segment.add_support([(*halves, "road")])
    weight = next(segment.model.vision_model.parameters())
    with torch.no_grad():
        weight.mul_(1.5)
    with pytest.raises(ValueError, match="has changed"):
        segment.save_support(tmp_path / "support.safetensors")
    assert not list(tmp_path.iterdir())


def test_clearing_a_class_without_a_name_keeps_all(segment, halves):
    segment.add_support([(*halves, "road")])
    with pytest.raises(ValueError, match="no support images of ''"):
        segment.clear_support("")
    assert len(segment.support) == 1


def test_a_mask_is_turned_upright_as_a_file_and_as_an_image(tmp_path):
    """Both as its photo is: of a square one nothing else would tell."""
    mask = np.zeros((32, 32), np.uint8)
    mask[:16] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90° clockwise
    Image.fromarray(mask).save(tmp_path / "mask.png", exif=exif)
    upright = [[0.0, 1.0], [0.0, 1.0]]
    for given in (tmp_path / "mask.png", Image.open(tmp_path / "mask.png")):
        assert mask_shares(given, (32, 32), (32, 32), 16).tolist() == upright


def test_the_penalty_that_is_shown_is_that_of_the_call(segment, picture, halves):
    segment.add_support([(*halves, "road")])
    shown = []
    for penalty in (None, 0.01, None):
        segment.support.penalty = penalty
        segment(picture, candidate_labels=["road", "sky"])
        shown.append(segment.support.chosen)
    assert shown == [PENALTIES[0], 0.01, PENALTIES[0]]


def test_support_stays_where_the_same_weights_lie_elsewhere(segment, picture, halves, tmp_path, caplog):
    """After a move to a GPU and back, and in a copy that was sent to another process."""
    image, mask = halves
    segment.add_support([(image, mask, "road"), (image, ~mask, "sky")])
    given = {"candidate_labels": ["road", "sky"], "output": "map"}
    expected = segment(picture, **given)["map"]
    for changed in (copy.deepcopy(segment), pickle.loads(pickle.dumps(segment)), segment):
        changed.model.double().float()
        np.testing.assert_array_equal(changed(picture, **given)["map"], expected)
        changed.save_support(tmp_path / "support.safetensors")
    segment.model.double().float()
    assert segment.load_support(tmp_path / "support.safetensors") == {"road": 2, "sky": 2} and not caplog.text
    with torch.no_grad():
        next(segment.model.vision_model.parameters()).mul_(1.5)
    segment.support.change([])
    segment.add_support([(image, mask, "road")])
    segment.save_support(tmp_path / "other.safetensors")
    with torch.no_grad():
        next(segment.model.vision_model.parameters()).mul_(1 / 3)
    other = vision_fingerprint(segment.model.vision_model)
    segment.support.save(tmp_path / "other.safetensors", other)
    segment.load_support(tmp_path / "other.safetensors")
    assert "support images that were added before are dropped" in caplog.text


def test_corrections_are_those_of_the_images_and_templates_of_the_call(segment, picture, halves):
    """Also of another set of as many images, and after the checkpoint's templates changed."""
    image, mask = halves
    given = {"candidate_labels": ["road", "sky"], "output": "probabilities"}
    found = []
    for swapped in (False, True):
        segment.support = SupportSet()
        segment.add_support([(image, mask ^ swapped, "sky"), (image, ~mask ^ swapped, "road")])
        segment.support.penalty = 0.003
        found.append(segment(picture, **given)["probabilities"])

    def fresh():
        segment.texts._remembered.clear()
        return segment(picture, **given)["probabilities"]

    np.testing.assert_array_equal(found[1], fresh())
    assert np.abs(np.asarray(found[0]) - np.asarray(found[1])).max() > 0.1
    segment.model.config.templates = "plain"
    np.testing.assert_array_equal(segment(picture, **given)["probabilities"], fresh())
