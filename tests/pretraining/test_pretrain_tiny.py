"""Pre-training on a made-up world of coloured classes: it must learn words, and never the held-out ones."""

import json
import math
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from accelerate import Accelerator
from coloured_world import COLOURS
from interrupting import at_call
from PIL import Image
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, BertConfig, BertModel, PreTrainedTokenizerFast

from spar_hf import SparForOpenVocabSegmentation
from spar_hf.model.prompts import embed_names
from spar_hf.pretraining import trainer
from spar_hf.pretraining.crops import CropBatches, CropSet, load_sets
from spar_hf.pretraining.losses import FOREIGN, draw_prompts, pixel_loss
from spar_hf.pretraining.model import build_model
from spar_hf.pretraining.options import NewModelOptions, TrainingOptions, check_sets, read_recipe
from spar_hf.pretraining.trainer import main
from spar_hf.pretraining.words import build_tokenizer, common_words, teach_words, word_targets
from spar_hf.utils.errors import NotFinite, UsageError
from spar_hf.utils.sample_record import read_samples

SMALL = {"window_size": 32, "hidden_size": 64, "layers": 1, "vocab_size": 400, "batch_size": 4, "text_steps": 5}
SMALL |= {"warmup_steps": 1, "workers": 0, "foreign_names": 2}

needs_muon = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has Muon from 2.9 on")


def arguments(world, output, **options):
    """A command line of the pre-training."""
    values = {"data": world, "recipe": world / "recipe.yaml", "output": output, **options}
    return [part for name, value in values.items() for part in (f"--{name}", str(value))]


def as_version_0_1_stored_it(file):
    """Version 0.1 kept the recipe elsewhere, had another name for the side of a window, and one optimizer."""
    state = json.loads(file.read_text())
    assert state["settings"]["mixed_precision"] == "no" and state["settings"]["start"] is None
    state["settings"]["window"] = state["settings"].pop("window_size")
    state["settings"]["recipe"] = "/elsewhere/training/recipe.yaml"
    assert state["settings"].pop("optimizer") == "adamw"
    file.write_text(json.dumps(state))


def test_held_out_words_are_in_no_label_and_no_text(world):
    recipe = yaml.safe_load((world / "recipe.yaml").read_text())
    recipe["synonyms"]["road"] = ["Bus"]  # nor by another class
    recipe["groups"] += [["n3", "n4", "bus"]]
    scenes, tagged = load_sets(world, recipe)
    assert scenes.names == [["sky", "blue sky"], ["road"], ["grass", "lawn"], []]
    assert len(scenes) == 9 and not any((mask == 3).any() for mask in scenes.masks)
    assert any((mask == 255).any() for mask in scenes.masks)
    assert tagged.names == [["blue ball", "ball"], ["green ball", "ball"], ["red ball"], ["grey ball"]]


def test_masks_that_do_not_fit_are_refused(world):
    recipe = yaml.safe_load((world / "recipe.yaml").read_text())
    mask = world / "scenes" / "masks" / "05.png"
    good = np.array(Image.open(mask))
    for wrong, message in ((good[:50], "Resize the mask"), (good + 4, "4 classes")):
        Image.fromarray(wrong).save(mask)
        with pytest.raises(UsageError, match=message):
            load_sets(world, recipe)


def test_a_set_whose_pixels_are_all_ignored_adds_nothing(world):
    """Not NaN, which would end in every weight."""
    for mask in (world / "scenes" / "masks").iterdir():
        Image.fromarray(np.full_like(np.array(Image.open(mask)), 255)).save(mask)
    small = SMALL | {"steps": 3}
    folder = main(arguments(world, world / "run", **small))
    row = json.loads((world / "run" / "log.jsonl").read_text().splitlines()[0])
    assert row["set0"] == 0 and row["set1"] > 0
    assert all(t.isfinite().all() for t in SparForOpenVocabSegmentation.from_pretrained(folder).state_dict().values())


def test_each_process_draws_batches_of_its_own(world, monkeypatch):
    """Otherwise more processes would only compute the same step again."""
    drawn, whole = [], CropBatches.__getitem__
    monkeypatch.setattr(CropBatches, "__getitem__", lambda self, number: drawn.append(number) or whole(self, number))
    monkeypatch.setattr(Accelerator, "num_processes", 2)
    for rank in (0, 1):
        monkeypatch.setattr(Accelerator, "process_index", rank)
        main(arguments(world, world / f"run{rank}", **SMALL, steps=2))
    assert drawn == [0, 2, 1, 3]


@pytest.mark.slow
def test_learns_words_and_resumes(world):
    common = SMALL | {"window_size": 64, "layers": 2, "batch_size": 8, "text_steps": 120, "warmup_steps": 10}
    common |= {"learning_rate": 2e-3, "save_steps": 150, "steps": 220, "seed": 1}
    folder = main(arguments(world, world / "run", **common))
    log = [json.loads(line) for line in (world / "run" / "log.jsonl").read_text().splitlines()]
    assert log[-1]["set0"] < 0.5 * log[0]["set0"]

    model = SparForOpenVocabSegmentation.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    names = ["sky", "road", "lawn"]
    with torch.no_grad():
        texts = embed_names(model, tokenizer, names, "plain")
        for index, colour in enumerate(("sky", "road", "grass")):
            pixels = torch.tensor(COLOURS[colour]).view(1, 3, 1, 1).expand(1, 3, 64, 64) / 127.5 - 1
            assert (model(pixels, text_embeds=texts).logits.argmax(1) == index).float().mean() > 0.7

    # the same run, stopped after its checkpoint and taken up again, ends in the same weights
    as_version_0_1_stored_it(world / "run" / "checkpoint-150" / "state.json")
    resumed = main(arguments(world, world / "run", resume=True, **common))
    again = SparForOpenVocabSegmentation.from_pretrained(resumed).state_dict()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(again[name], tensor, atol=1e-6, rtol=1e-5)

    with pytest.raises(UsageError, match="--resume"):  # or it would mix its checkpoints with these
        main(arguments(world, world / "run", **common))
    with pytest.raises(UsageError, match=r"--seed \(was 1, is 2\)"):
        main(arguments(world, world / "run", resume=True, **common | {"seed": 2}))

    # another run goes on from the finished model: what it knows is kept, its words and sizes stand
    more = common | {"steps": 21, "learning_rate": 1e-4, "start": folder}
    with pytest.raises(UsageError, match="leave out --window_size, --hidden_size"):
        main(arguments(world, world / "more", **more))
    more = {name: value for name, value in more.items() if not hasattr(NewModelOptions(), name)}
    further = SparForOpenVocabSegmentation.from_pretrained(main(arguments(world, world / "more", **more)))
    later = [json.loads(line) for line in (world / "more" / "log.jsonl").read_text().splitlines()]
    assert further.config.image_size == 64 and max(row["set0"] for row in later) < 0.5 * log[0]["set0"]
    trained, before = further.state_dict(), model.state_dict()
    same = {name for name, tensor in before.items() if torch.equal(trained[name], tensor)}
    assert same == {name for name in before if name.startswith(("text_model.", "logit_"))}


def test_words_without_labels_lie_near_words_with_some(world):
    """With a sentence encoder as teacher a word that labels nothing gets an embedding from what it means."""
    words = ["<pad>", "[UNK]", "sky", "road", "grass", "lawn", "blue", "ball", "red", "green", "grey", "street"]
    encoder = world / "encoder"
    torch.manual_seed(0)
    config = BertConfig(vocab_size=len(words), hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    bert = BertModel(config)
    with torch.no_grad():  # this little encoder thinks that a street is a road
        embedding = bert.embeddings.word_embeddings.weight
        embedding.normal_()
        embedding[words.index("street")] = embedding[words.index("road")]
    bert.save_pretrained(encoder)
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", unk_token="[UNK]").save_pretrained(encoder)

    sets = load_sets(world, yaml.safe_load((world / "recipe.yaml").read_text()))
    assert common_words(str(encoder), 3) == ["sky", "road", "grass"]
    listed, targets, labels = word_targets(sets, ["street", "road"], 8, str(encoder), seed=0)
    assert listed[labels:] == ["street"] and targets.shape == (len(listed), 8)
    close = targets[listed.index("street")] @ targets.T
    assert set(close.argsort(descending=True)[:2].tolist()) == {labels, listed.index("road")}
    same = targets[listed.index("grass")] @ targets[listed.index("lawn")]
    torch.testing.assert_close(same, torch.tensor(1.0))  # synonyms share their class's direction

    tokenizer = build_tokenizer(sets, ["street"], 400)
    model = build_model(NewModelOptions(window_size=64, hidden_size=64, layers=1), tokenizer)
    reached = teach_words(model, tokenizer, sets, ["street"], str(encoder), steps=60, seed=0)
    assert min(reached.values()) > 0.8
    assert not any(weight.requires_grad for weight in model.text_model.parameters())


@pytest.mark.parametrize("optimizer", ["adamw", pytest.param("muon", marks=needs_muon)])
def test_sigterm_stops_after_the_step(world, monkeypatch, optimizer):
    small = SMALL | {"steps": 6, "optimizer": optimizer}
    whole = main(arguments(world, world / "whole", **small))
    monkeypatch.setattr(trainer, "step_loss", at_call(3, trainer.step_loss))
    assert main(arguments(world, world / "run", **small)) is None
    monkeypatch.undo()
    assert sorted(path.name for path in (world / "run").iterdir()) == [
        "checkpoint-3", "images.json.gz", "log.jsonl", "tokenizer.json",
    ]  # fmt: skip
    resumed = main(arguments(world, world / "run", **small, resume=True))
    weights = [load_file(folder / "model.safetensors") for folder in (whole, resumed)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@needs_muon
def test_muon_steps_are_orthogonal_matrices_as_long_as_those_of_adamw(world):
    """The first singular values of a block's change are about equal; other weights are AdamW's."""
    common = SMALL | {"steps": 1, "warmup_steps": 0, "weight_decay": 0, "learning_rate": 0.05}
    start = main(arguments(world, world / "start", **common | {"learning_rate": 1e-9}))
    more = {name: value for name, value in common.items() if not hasattr(NewModelOptions(), name)}
    folders = [main(arguments(world, world / kind, **more, start=start, optimizer=kind)) for kind in ("adamw", "muon")]
    before, adamw, muon = (load_file(folder / "model.safetensors") for folder in (start, *folders))
    matrix = "vision_model.backbone.encoder.layers.0.mlp.fc1.weight"
    first = [torch.linalg.svdvals(weights[matrix].float() - before[matrix].float())[:5] for weights in (adamw, muon)]
    expected = 0.05 * 0.2 * max(before[matrix].shape) ** 0.5  # arXiv 2502.16982, equation 4
    assert ((first[1] / expected - 1).abs() < 0.3).all() and first[0][0] > 2 * first[0][4]
    table = "vision_model.backbone.embeddings.position_embedding.weight"
    assert torch.equal(adamw[table], muon[table]) and not torch.equal(muon[table], before[table])


def test_muon_where_it_does_not_work_is_refused(world, monkeypatch):
    monkeypatch.delattr(torch.optim, "Muon", raising=False)
    with pytest.raises(UsageError, match=r"torch 2\.9"):
        main(arguments(world, world / "run", **SMALL, steps=1, optimizer="muon"))
    with pytest.raises(UsageError, match="adamw"):
        main(arguments(world, world / "run", **SMALL, steps=1, optimizer="sgd"))


def test_a_training_that_diverges_and_a_finished_one_are_no_success(world, monkeypatch):
    small = SMALL | {"steps": 9, "save_steps": 1}
    step_loss, calls = trainer.step_loss, []

    def diverging(*args):
        calls.append(args)
        loss, parts = step_loss(*args)
        return (loss * math.nan if len(calls) > 2 else loss), parts

    monkeypatch.setattr(trainer, "step_loss", diverging)
    with pytest.raises(NotFinite, match=r"in 4 steps.*--max_bad_steps 3"):
        main(arguments(world, world / "diverged", **small, max_bad_steps=3))
    assert not (world / "diverged" / "model").exists() and not (world / "diverged" / ".lock").exists()
    assert all(
        tensor.isfinite().all()
        for tensor in load_file(sorted((world / "diverged").glob("checkpoint-*"))[-1] / "model.safetensors").values()
    )
    monkeypatch.undo()
    main(arguments(world, world / "done", **small | {"steps": 1}))
    with pytest.raises(UsageError, match="--overwrite"):
        main(arguments(world, world / "done", **small | {"steps": 1}))
    main(arguments(world, world / "done", **small | {"steps": 2}, overwrite=True))


def test_images_that_changed_are_refused(world, tmp_path, monkeypatch):
    copy = shutil.copytree(world, tmp_path / "world", ignore=shutil.ignore_patterns("run", "whole", "done", "diverged"))
    small = SMALL | {"steps": 4}
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "step_loss", at_call(1, trainer.step_loss))
        assert main(arguments(copy, copy / "run", **small)) is None
    record = read_samples(copy / "run")
    first = Path(record["train"][0])
    shutil.copy(first, first.with_name(f"000{first.suffix}"))
    mask = next((first.parents[1] / "masks").glob(f"{first.stem}.*"))
    shutil.copy(mask, mask.with_name(f"000{mask.suffix}"))
    with pytest.raises(UsageError, match=r"1 added \(.*000"):
        main(arguments(copy, copy / "run", **small, resume=True))
    shutil.copy(
        copy / "tagged" / "n0_blue_ball.jpg", copy / "tagged" / "n9_a_quick_brown_fox.jpg"
    )  # changes the tokens
    began = (copy / "run" / "tokenizer.json").read_text()
    result = main(arguments(copy, copy / "run", **small, resume=True, allow_changed_data=True))
    sets = load_sets(copy, yaml.safe_load((copy / "recipe.yaml").read_text()))
    other = build_tokenizer(sets, [], small["vocab_size"]).backend_tokenizer
    vocabularies = [Tokenizer.from_str(text).get_vocab() for text in (began, other.to_str())]
    assert AutoTokenizer.from_pretrained(result).get_vocab() == vocabularies[0] != vocabularies[1]
    after = read_samples(copy / "run")
    assert after["held_out"] == record["held_out"] and len(after["train"]) == len(record["train"]) + 2


def test_an_image_of_several_sets_is_held_out_of_all_of_them(world):
    """Counted in each set by itself, and as a resumed run splits them."""
    recipe = yaml.safe_load((world / "recipe.yaml").read_text())
    spec = {"path": "scenes", "weight": 1, "crop": [30, 60]}
    recipe["sets"] += [spec | {"holdout_every": 3}, spec]
    sets = load_sets(world, recipe)[:3]
    held_out = {Path(file).name for crops in sets for file in crops.held_out}
    assert held_out == {"04.png", "08.png", "02.png", "05.png", "11.png"}
    for crops in sets:
        assert not held_out & {Path(file).name for file in crops.files}
    resumed = load_sets(world, recipe, [file for crops in sets for file in crops.held_out])
    assert [crops.files for crops in resumed[:3]] == [crops.files for crops in sets]


def test_a_run_goes_on_with_the_recipe_that_it_began_with(world, monkeypatch):
    """Another recipe of the same name has other words, to which the trained text tower does not belong."""
    small = SMALL | {"steps": 3}
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "step_loss", at_call(1, trainer.step_loss))
        assert main(arguments(world, world / "run", **small)) is None
    recipe = world / "recipe.yaml"
    began, moved = recipe.read_text(), world / "moved" / "recipe.yaml"
    recipe.write_text(began.replace("- bus", "- road"))
    with pytest.raises(UsageError, match=r"--recipe \(was 'recipe.yaml with content"):
        main(arguments(world, world / "run", **small, resume=True))
    moved.parent.mkdir()
    moved.write_text("# a comment changes nothing\n" + began)
    assert main([*arguments(world, world / "run", **small, resume=True), "--recipe", str(moved)])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sets": [{"path": "scenes", "weight": 1}]}, "number 1 of `sets` has no crop"),
        (
            {"tagged": [{"path": "tagged", "weight": 1, "crop": [9, 9]}, "x"]},
            "number 2 of `tagged` has no path, weight",
        ),
        ({"sets": [], "tagged": []}, "no set"),
        ({"sets": [{"path": "scenes", "weight": 0, "crop": [9, 9]}]}, "scenes: weight 0 must be a number above 0"),
        ({"sets": [{"path": "scenes", "weight": 1, "crop": 60}]}, "crop 60 must be"),
        ({"tagged": [{"path": "tagged", "weight": 1, "crop": [90, 60]}]}, r"crop \[90, 60\] must be"),
        ({"sets": [{"path": "scenes", "weight": 1, "crop": [9, 9], "holdout_every": 1}]}, "holdout_every 1"),
        (
            {"sets": [{"path": "scenes", "weight": 1, "crop": [9, 9], "holdout": 5}]},
            "holdout is not read.*holdout_every",
        ),
        (
            {"tagged": [{"path": "tagged", "weight": 1, "crop": [9, 9], "holdout_every": 5}]},
            "tagged: holdout_every is not read",
        ),
    ],
)
def test_incomplete_recipes_are_refused(tmp_path, change, message):
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump({"sets": [], "held_out": [], **change}))
    with pytest.raises(UsageError, match=message):
        check_sets(str(file), read_recipe(str(file)))


def test_sets_that_leave_no_image_are_named(world):
    recipe = yaml.safe_load((world / "recipe.yaml").read_text())
    names = ["bus", "blue ball", "green ball", "red ball", "grey ball"]
    with pytest.raises(UsageError, match="tagged leaves no image"):
        load_sets(world, {**recipe, "held_out_tags": names})
    files = [str(file) for file in (world / "scenes" / "images").iterdir()]
    with pytest.raises(UsageError, match="scenes leaves no image"):
        load_sets(world, recipe, files)


def test_windows_that_are_no_multiple_of_the_patch_are_refused():
    with pytest.raises(UsageError, match="--window_size 200 must be a multiple of the patch of 16 px, such as 192"):
        NewModelOptions(window_size=200)


@pytest.mark.parametrize("named", [True, False])
def test_processes_do_not_wait_for_the_gradients_of_a_head_that_nothing_trains(world, monkeypatch, named):
    """Without named images no loss reads the pooled embedding."""
    given, seen = yaml.safe_load((world / "recipe.yaml").read_text()), []
    (world / "recipe.yaml").write_text(yaml.safe_dump(given if named else given | {"tagged": []}))
    start = trainer.start_accelerator

    def started(*args, **options):
        seen.append(options["kwargs_handlers"][0].find_unused_parameters)
        return start(*args, **options)

    monkeypatch.setattr(trainer, "start_accelerator", started)
    monkeypatch.setattr(
        Accelerator, "backward", lambda self, loss: (loss.backward(), heads.append(probe_gradient(self)))[0]
    )
    heads = []

    def probe_gradient(accelerator):
        (towers,) = accelerator._models
        return towers.model.vision_model.backbone.head.probe.grad is None

    main(arguments(world, world / "run", **SMALL, steps=1))
    assert seen == heads == [not named]


def test_what_a_recipe_leaves_out_is_empty(world):
    given = yaml.safe_load((world / "recipe.yaml").read_text())
    file = world / "short.yaml"
    file.write_text(yaml.safe_dump({"sets": given["sets"], "tagged": given["tagged"], "held_out": None}))
    scenes, tagged = load_sets(world, read_recipe(str(file)))
    assert scenes.names == [["sky"], ["road"], ["grass"], ["bus"]] and len(tagged) == 5


def test_a_class_called_null_says_nothing_whatever_else_it_is(world):
    """Unnamed, held out, or neither: then its synonyms speak for it."""
    classes = world / "scenes" / "classes.txt"
    given, text = yaml.safe_load((world / "recipe.yaml").read_text()), classes.read_text()
    classes.write_text(text.replace("road", "null"))
    for change, expected in (({}, ["lane"]), ({"unnamed": "null"}, []), ({"held_out": ["null"]}, [])):
        recipe = given | {"synonyms": {"null": ["lane"]}, "held_out": change.get("held_out", [])}
        recipe["sets"] = [{**given["sets"][0], **{k: v for k, v in change.items() if k == "unnamed"}}]
        assert load_sets(world, recipe)[0].names[1] == expected


class TestUnnamedClass:
    """A set whose class `road` stands for pixels that belong to none of its other classes."""

    @pytest.fixture
    def sets(self, world):
        recipe = yaml.safe_load((world / "recipe.yaml").read_text())
        recipe["sets"][0]["unnamed"] = "road"
        return load_sets(world, recipe)

    def test_its_word_stands_beside_those_of_other_sets_every_second_time(self, sets):
        """It is never the word of a named class."""
        scenes = sets[0]
        assert scenes.unnamed == 1 and scenes.names[1] == []
        assert any((mask == 1).any() for mask in scenes.masks)  # its pixels are not ignored
        labels = [torch.tensor([[[0, 1], [2, 1]]]), torch.tensor([0])]
        with_word = 0
        for seed in range(200):
            options = TrainingOptions(foreign_names=2)
            prompts = draw_prompts(sets, labels, options, random.Random(seed))[0]
            found = ["road" in text for text in prompts.texts]
            assert not any(found[:4])
            assert found[4:] in ([], [True])
            with_word += any(found)
            assert prompts.targets == [0, 2] + [FOREIGN] * (len(found) - 2)
            assert {"sky", "lawn", "grass"} & set(" ".join(prompts.texts[:2]).replace(".", " ").split())
        assert 70 < with_word < 130

    def test_its_pixels_are_pushed_to_words_of_other_sets_together(self):
        classes, weights = torch.tensor([0, 2, FOREIGN, FOREIGN]), torch.ones(3)
        labels = torch.full((1, 2, 2), 1)

        def loss(*probabilities):
            logits = torch.tensor(probabilities).log().view(1, 4, 1, 1).expand(1, 4, 2, 2)
            return float(pixel_loss(logits, labels, classes, weights, unnamed=1))

        assert loss(0.25, 0.25, 0.25, 0.25) == pytest.approx(-math.log(0.5), rel=1e-5)
        assert loss(0.1, 0.1, 0.7, 0.1) == pytest.approx(loss(0.1, 0.1, 0.4, 0.4), rel=1e-5)  # any of them is right
        assert loss(0.1, 0.1, 0.4, 0.4) < loss(0.25, 0.25, 0.25, 0.25) < loss(0.45, 0.45, 0.05, 0.05)

    def test_its_pixels_never_pull_a_named_class(self):
        """The gradient raises foreign words alone; where there are none, the pixels are ignored."""
        labels, weights = torch.full((1, 3, 3), 1), torch.ones(3)
        logits = torch.randn(1, 4, 3, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
        pixel_loss(logits, labels, torch.tensor([0, 2, FOREIGN, FOREIGN]), weights, unnamed=1).backward()
        assert (logits.grad[:, :2] > 0).all() and (logits.grad[:, 2:] < 0).all()

        logits = torch.randn(1, 2, 3, 3).requires_grad_()
        loss = pixel_loss(logits, labels, torch.tensor([0, 2]), weights, unnamed=1)
        loss.backward()
        assert loss == 0 and not logits.grad.any()

    def test_a_class_that_is_none_is_refused(self, world):
        recipe = yaml.safe_load((world / "recipe.yaml").read_text())
        recipe["sets"][0]["unnamed"] = "background"
        with pytest.raises(UsageError, match=r"'background' is no class.*sky, road"):
            load_sets(world, recipe)


def test_even_classes__images_are_drawn_by_class():
    """Of ten images nine hold class 0, and one holds classes 1 and 2: the roots of 9, 1 and 1 are two draws of five."""
    masks = [np.zeros((8, 8), np.uint8) for _ in range(10)]
    masks[9][:4], masks[9][4:] = 1, 2
    images, names = [np.zeros((8, 8, 3), np.uint8)] * 10, [["sky"], ["road"], ["grass"], []]
    spec = {"weight": 1, "crop": [4, 8]}

    def share_of_the_last(spec):
        crop_set, rng = CropSet(images, masks, names, spec), random.Random(0)
        drawn = [crop_set.draw_image(rng) for _ in range(3000)]
        assert set(drawn) == set(range(10))
        return drawn.count(9) / len(drawn)

    assert share_of_the_last(spec) == pytest.approx(1 / 10, abs=0.02)
    assert share_of_the_last({**spec, "even_classes": True}) == pytest.approx(2 / 5, abs=0.03)
