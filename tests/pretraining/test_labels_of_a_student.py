"""A student that goes on with labels: crops of several sides, near the features that it had."""

import json
import random
import shutil

import numpy as np
import pytest
import torch
import yaml
from changing import change_weights
from safetensors.torch import load_file
from torch import nn

import spar_hf
from spar_hf import SparForOpenVocabSegmentation, SparProcessor
from spar_hf.pretraining import trainer
from spar_hf.pretraining.crops import CropBatches, CropSet, load_sets
from spar_hf.pretraining.losses import FOREIGN, draw_prompts, step_loss
from spar_hf.pretraining.model import Towers
from spar_hf.pretraining.options import RECIPE, TrainingOptions, check_sets, read_recipe
from spar_hf.pretraining.trainer import main
from spar_hf.utils.errors import UsageError

LABELS = [RECIPE.with_name(f"spar_tiny_{name}.yaml") for name in ("labels", "more_labels")]
FURTHER = {
    "steps": 2,
    "batch_size": 4,
    "warmup_steps": 0,
    "workers": 0,
    "learning_rate": 1e-4,
    "start": spar_hf.SPAR_TINY,
}


def command_of(world, **options):
    """The arguments of a short training of the coloured world."""
    given = {"data": world, "recipe": world / "recipe.yaml", "output": world / "run", **FURTHER, **options}
    return [part for name, value in given.items() for part in (f"--{name}", str(value))]


@pytest.fixture
def towers():
    model = SparForOpenVocabSegmentation.from_pretrained(spar_hf.SPAR_TINY)
    return Towers(model), SparProcessor.from_pretrained(spar_hf.SPAR_TINY).tokenizer


def test_the_crops_of_a_step_have_one_side(world):
    """Also those of different processes, of which one would wait for the other."""
    sets = load_sets(world, read_recipe(str(world / "recipe.yaml")))
    batches = CropBatches(sets, 4, [32, 48, 64], steps=40, seed=1, processes=2)
    sides = []
    for number in range(40):
        groups = batches[number]
        assert all(pixels.shape[-2] == pixels.shape[-1] for pixels, _ in groups)
        (side,) = {pixels.shape[-1] for pixels, _ in groups}
        assert groups[0][1].shape[-2:] == (side // 4, side // 4)
        sides.append(side)
    assert set(sides) == {32, 48, 64} and sides[::2] == sides[1::2]
    assert all(torch.equal(a, b) for a, b in zip(batches[3][0], batches[3][0], strict=True))


def test_the_loss_grows_with_the_distance_from_the_anchor(world, towers):
    sets = load_sets(world, read_recipe(str(world / "recipe.yaml")))
    groups = CropBatches(sets, 4, [48], steps=1, seed=0)[0]
    student, tokenizer = towers
    anchor = trainer.anchor_of(student.model, 0.5, torch.device("cpu"))
    options = TrainingOptions(start="model", anchor_weight=0.5)

    def losses():
        rest = (tokenizer, sets, groups, options)
        with torch.no_grad():
            plain, _ = step_loss(student, *rest, random.Random(0), torch.device("cpu"))
            return plain, *step_loss(student, *rest, random.Random(0), torch.device("cpu"), anchor)

    plain, near, parts = losses()
    assert torch.equal(near, plain) and parts["anchor"] == 0
    with torch.no_grad():
        pixels = torch.cat([of_set for of_set, _ in groups])
        before = student.model.vision_model(pixels).feature_map
        for weight in student.model.vision_model.backbone.blocks[-1].parameters():
            weight.add_(0.01)
        after = student.model.vision_model(pixels).feature_map
    plain, far, parts = losses()
    distance = (after - before).square().mean()
    torch.testing.assert_close(parts["anchor"], distance)
    torch.testing.assert_close(far, plain + 0.5 * distance)


def test_a_student_goes_on_with_labels(world):
    """Its record says so, its text tower stays, and an anchor keeps its features nearer to what they were."""
    free, held = (
        main([*command_of(world, output=world / name, anchor_weight=weight), "--crop_sides", "32", "64"])
        for name, weight in (("free", 0), ("held", 300))
    )
    record = SparForOpenVocabSegmentation.from_pretrained(held).config.distillation
    start = SparForOpenVocabSegmentation.from_pretrained(spar_hf.SPAR_TINY)
    before = start.config.distillation
    of_other_weights = {"held_out", "weights"}
    assert "weights" in before and record.keys() == before.keys() - of_other_weights
    assert all(record[name] == before[name] for name in record if name != "labels")
    *earlier, labels = record["labels"]
    assert earlier == before["labels"]  # trained again with labels, it still says what it learned from first
    assert (labels["crop_sides"], labels["anchor_weight"], labels["crops_per_step"]) == ([32, 64], 300, 4)
    assert labels["sets"] == ["scenes", "tagged"]
    rows = [json.loads(line) for line in (world / "held" / "log.jsonl").read_text().splitlines()]
    assert rows[0]["anchor"] == 0  # nothing was changed before the first step

    pixels = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        before, *after = (
            SparForOpenVocabSegmentation.from_pretrained(folder).vision_model(pixels).feature_map
            for folder in (spar_hf.SPAR_TINY, free, held)
        )
    moved = [float(nn.functional.mse_loss(features, before)) for features in after]
    assert 0 < moved[1] < moved[0]
    weights = load_file(held / "model.safetensors")
    for name, tensor in start.state_dict().items():
        if name.startswith("text_model."):
            assert torch.equal(weights[name].float(), tensor), name


def test_a_model_trained_further_keeps_its_processor(world, tmp_path):
    start = tmp_path / "start"
    SparForOpenVocabSegmentation.from_pretrained(spar_hf.SPAR_TINY).save_pretrained(start)
    processor = SparProcessor.from_pretrained(spar_hf.SPAR_TINY)
    processor.image_processor.size = {"shortest_edge": 160, "longest_edge": 640}
    processor.save_pretrained(start)
    result = main(command_of(world, start=start))
    assert dict(SparProcessor.from_pretrained(result).image_processor.size) == processor.image_processor.size


def test_a_resumed_run_goes_on_from_the_weights_it_began_with(world, tmp_path):
    """The anchor is no part of a checkpoint: it is read again from --start."""
    start = tmp_path / "start"
    SparForOpenVocabSegmentation.from_pretrained(spar_hf.SPAR_TINY).save_pretrained(start)
    SparProcessor.from_pretrained(spar_hf.SPAR_TINY).save_pretrained(start)
    options = {"start": start, "anchor_weight": 0.5, "steps": 4, "save_steps": 2}
    whole = load_file(main(command_of(world, **options)) / "model.safetensors")
    resumed = [*command_of(world, **options), "--resume"]
    shutil.rmtree(world / "run" / "model")
    again = load_file(main(resumed) / "model.safetensors")
    assert whole.keys() == again.keys() and all(torch.equal(whole[name], again[name]) for name in whole)

    shutil.rmtree(world / "run" / "model")
    change_weights(start, "vision_model")
    with pytest.raises(UsageError, match="those of --start changed since the run began"):
        main(resumed)
    (state,) = (world / "run").glob("checkpoint-2/state.json")
    values = json.loads(state.read_text())
    del values["start_weights"]  # as an earlier version wrote it
    state.write_text(json.dumps(values))
    assert main(resumed)


def test_balance__how_much_rare_classes_count():
    """Three quarters of the pixels are of one class, the rest of another."""
    mask = np.zeros((8, 8), np.uint8)
    mask[:2] = 1
    image = np.zeros((8, 8, 3), np.uint8)

    def ratio(**spec):
        weights = CropSet([image], [mask], [["sky"], ["road"]], {"weight": 1, "crop": [4, 8], **spec}).class_weights
        return float(weights[1] / weights[0])

    assert ratio(balance=0) == 1
    assert ratio(balance=0.5) == pytest.approx(3**0.5, rel=1e-5)
    assert ratio() == pytest.approx(3**0.35, rel=1e-5)


def test_unnamed_weight__how_much_pixels_of_none_of_the_classes_count(world, towers):
    """The loss is a weighted mean of two: with three times the weight, the unnamed pixels' has three times the share."""
    recipe = read_recipe(str(world / "recipe.yaml"))
    student, tokenizer = towers

    def loss(**weight):
        recipe["sets"][0] = {**recipe["sets"][0], "unnamed": "road", **weight}
        sets = load_sets(world, recipe)
        groups = CropBatches(sets, 4, [48], steps=1, seed=0)[0]
        present = groups[0][1].unique().tolist()
        assert sets[0].unnamed in present and len(present) > 1
        rest = (TrainingOptions(), random.Random(0), torch.device("cpu"))
        with torch.no_grad():
            return step_loss(student, tokenizer, sets, groups, *rest)[1]["set0"].double()

    usual = loss()
    named, unnamed = loss(unnamed_weight=0), loss(unnamed_weight=1e9)

    def odds(weight):
        found = loss(unnamed_weight=weight)
        return (found - named) / (unnamed - found)

    assert usual == loss(unnamed_weight=0.3) and odds(1) > 0
    torch.testing.assert_close(odds(3), 3 * odds(1), rtol=1e-3, atol=0)
    torch.testing.assert_close(odds(0.3), 0.3 * odds(1), rtol=1e-3, atol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"crop_sides": [256]}, "--start"),
        ({"anchor_weight": 0.5}, "--start"),
        ({"start": "model", "crop_sides": [256, 200]}, "--crop_sides 200 must be a multiple of the patch of 16 px"),
        ({"start": "model", "crop_sides": [0]}, "--crop_sides 0"),
        ({"start": "model", "anchor_weight": -1.0}, "--anchor_weight"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        TrainingOptions(**options)


@pytest.mark.parametrize("file", LABELS, ids=lambda file: file.stem)
def test_the_recipes_of_labels_hold_out_what_the_base_did(file):
    """What such a recipe does not say is as in the recipe of the base: above all the held-out words."""
    base, labels = (read_recipe(str(each)) for each in (RECIPE, file))
    check_sets(str(file), labels)
    assert labels["held_out"] == base["held_out"] and "bus" in labels["held_out"]
    assert [spec["path"] for spec in labels["sets"]] == [spec["path"] for spec in base["sets"]]
    assert labels["tagged"] == [] and labels["synonyms"] == {"null": ["background"]}
    for spec, of_base in zip(labels["sets"], base["sets"], strict=True):  # what the base held out stays held out
        assert spec.get("exclude") == of_base.get("exclude")
        every, before = spec.get("holdout_every", 0), of_base.get("holdout_every", 0)
        assert before == every == 0 or before % every == 0


def test_recipes_based_on_others(tmp_path):
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "deep.yaml").write_text("based_on: ../other.yaml\nwords: [tree]\n")
    (tmp_path / "other.yaml").write_text("based_on: missing.yaml\n")
    with pytest.raises(UsageError, match=r"missing\.yaml"):
        read_recipe(str(tmp_path / "other.yaml"))
    (tmp_path / "missing.yaml").write_text(yaml.safe_dump({"sets": [], "held_out": ["bus"]}))
    assert read_recipe(str(tmp_path / "other.yaml"))["held_out"] == ["bus"]
    deep = read_recipe(str(tmp_path / "below" / "deep.yaml"))
    assert deep["held_out"] == ["bus"] and deep["words"] == ["tree"]
    (tmp_path / "missing.yaml").write_text(yaml.safe_dump({"sets": [], "held_out": [], "based_on": "other.yaml"}))
    with pytest.raises(UsageError, match="circle"):
        read_recipe(str(tmp_path / "other.yaml"))


def test_a_set_whose_labels_are_left_out_only_anchors(world, towers):
    """Its images keep their features, its words stay among the wrong answers of other sets."""
    other = world / "others"
    shutil.copytree(world / "scenes", other)
    (other / "classes.txt").write_text("\n".join(["harbor", "temple", "cactus", "ladder"]))
    recipe = read_recipe(str(world / "recipe.yaml"))
    recipe["sets"].append({**recipe["sets"][0], "path": "others", "labels": False})
    recipe["tagged"] = []
    sets = load_sets(world, recipe)
    assert all((mask == 255).all() for mask in sets[1].masks) and ["temple"] in sets[1].names
    assert any((mask != 255).any() for mask in sets[0].masks)
    labels = [label for _, label in CropBatches(sets, 4, [48], steps=1, seed=0)[0]]
    of_first = draw_prompts(sets, labels, TrainingOptions(), random.Random(0))[0]
    wrong = [text for text, target in zip(of_first.texts, of_first.targets, strict=True) if target == FOREIGN]
    assert any("temple" in text for text in wrong)
    student, tokenizer = towers
    anchor = trainer.anchor_of(student.model, 0.5, torch.device("cpu"))
    with torch.no_grad():
        for weight in student.model.vision_model.backbone.blocks[-1].parameters():
            weight.add_(0.01)
        groups = CropBatches(sets, 4, [48], steps=1, seed=0)[0]
        options = TrainingOptions(start="model", anchor_weight=0.5)
        _, parts = step_loss(student, tokenizer, sets, groups, options, random.Random(0), torch.device("cpu"), anchor)
    assert parts["set1"] == 0 < parts["set0"] and parts["anchor"] > 0

    (world / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.raises(UsageError, match=r"others, which has `labels: false`: give --anchor_weight"):
        main(command_of(world))
    result = main(command_of(world, anchor_weight=0.5))
    record = SparForOpenVocabSegmentation.from_pretrained(result).config.distillation
    assert record["labels"][-1]["sets"] == ["scenes"]
    (world / "recipe.yaml").write_text(yaml.safe_dump({**recipe, "sets": recipe["sets"][1:]}))
    with pytest.raises(UsageError, match="no set to train on whose labels are read"):
        main(command_of(world, anchor_weight=0.5, output=world / "unlabelled"))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"balance": -0.1}, r"balance -0\.1 must lie between 0 and 1"),
        ({"balance": 2}, "balance 2 must"),
        ({"balance": "0.5"}, "balance '0.5' must"),
        ({"labels": "no"}, "labels 'no' must be true or false"),
        ({"even_classes": "no"}, "even_classes 'no' must be true or false"),
        ({"weight": float("inf")}, "weight inf must be a number above 0"),
        ({"weight": float("nan")}, "weight nan must be"),
        ({"unnamed": "road", "unnamed_weight": -1}, "unnamed_weight -1 must be a number of at least 0"),
        ({"unnamed": "road", "unnamed_weight": float("nan")}, "unnamed_weight nan must be"),
        ({"unnamed": "road", "unnamed_weight": float("inf")}, "unnamed_weight inf must be"),
        ({"unnamed_weight": 1}, "name it, or leave the weight out"),
        ({"labels": False, "unnamed": "road", "unnamed_weight": 1}, "unnamed_weight is about labelled pixels"),
        ({"labels": False, "balance": 0.5}, "balance is about labelled pixels"),
        ({"labels": False, "even_classes": True}, "even_classes is about labelled pixels"),
    ],
)
def test_impossible_values_of_a_set_are_refused(tmp_path, wrong, message):
    file = tmp_path / "recipe.yaml"
    spec = {"path": "scenes", "weight": 1, "crop": [9, 9], **wrong}
    file.write_text(yaml.safe_dump({"sets": [spec], "held_out": []}))
    with pytest.raises(UsageError, match=message):
        check_sets(str(file), read_recipe(str(file)))


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"held_out": "bus"}, r"held_out must be a list, such as held_out: \[...\], and is 'bus'"),
        ({"held_out_tags": "minibus"}, "held_out_tags must be a list"),
        ({"heldout": ["bus"]}, "heldout is not read"),
        ({"synonym": {"sky": ["clouds"]}}, "synonym is not read"),
        ({"synonyms": ["clouds"]}, "synonyms must be lists by the word"),
        ({"synonyms": {"sky": "clouds"}}, "synonyms must be lists by the word"),
        ({"held_out": [None]}, "None is no word to YAML. Put it in quotes"),
        ({"held_out_tags": ["ski", True]}, "True is no word"),
        ({"synonyms": {None: ["backdrop"]}}, "None is no word"),
        ({"synonyms": {"sky": [7]}}, "7 is no word"),
    ],
)
def test_parts_of_a_recipe_of_the_wrong_kind_are_refused(tmp_path, parts, message):
    """A word that is held out by a slip of the pen would be trained on."""
    file = tmp_path / "recipe.yaml"
    file.write_text(
        yaml.safe_dump({"sets": [{"path": "scenes", "weight": 1, "crop": [9, 9]}], "held_out": [], **parts})
    )
    with pytest.raises(UsageError, match=message):
        read_recipe(str(file))


def test_the_sets_share_exactly_the_crops_of_a_batch():
    def sets(*weights):
        mask = np.zeros((8, 8), np.uint8)
        spec = {"crop": [4, 8]}
        return [CropSet([np.zeros((8, 8, 3), np.uint8)], [mask], [["sky"]], {**spec, "weight": w}) for w in weights]

    for size in range(5, 70):
        counts = CropBatches(sets(10, 7, 4, 2, 1), size, [32], steps=1, seed=0).counts
        assert sum(counts) == size and min(counts) >= 1
        # no set has a whole crop more than its share, except for its only one
        assert all(
            count == 1 or count < size * weight / 24 + 1 for count, weight in zip(counts, (10, 7, 4, 2, 1), strict=True)
        )
    assert counts[0] > counts[1] > counts[2] > counts[3] > counts[4]
    with pytest.raises(UsageError, match=r"--batch_size 4 is less than a crop of each of the recipe's 5 sets"):
        CropBatches(sets(10, 7, 4, 2, 1), 4, [32], steps=1, seed=0)


def test_pixels_of_a_class_without_a_word_are_ignored(world):
    """As "null" is, which says nothing to a reader, where a recipe has no synonym for it."""
    (world / "scenes" / "classes.txt").write_text("\n".join(["sky", "null", "grass", "bus"]))
    recipe = {**read_recipe(str(world / "recipe.yaml")), "tagged": [], "synonyms": {}}
    (scenes,) = load_sets(world, recipe)
    assert scenes.names[1] == [] and not any((mask == 1).any() for mask in scenes.masks)
    groups = CropBatches([scenes], 8, [48], steps=1, seed=0)[0]
    draw_prompts([scenes], [groups[0][1]], TrainingOptions(), random.Random(0))
    recipe["synonyms"] = {"null": ["backdrop"]}
    (scenes,) = load_sets(world, recipe)
    assert scenes.names[1] == ["backdrop"] and any((mask == 1).any() for mask in scenes.masks)
