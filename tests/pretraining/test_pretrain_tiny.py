"""The pre-training script on a made-up world of three colours: it must learn words, and never the held-out ones."""

import json

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, BertConfig, BertModel, PreTrainedTokenizerFast

from spar_hf import SparForOpenVocabSegmentation
from spar_hf.model.prompts import embed_names
from spar_hf.pretraining.trainer import FIRST, Options, build_model, load_sets, train
from spar_hf.pretraining.words import build_tokenizer, common_words, teach_words, word_targets

COLOURS = {"sky": (90, 150, 240), "road": (90, 90, 90), "grass": (60, 170, 50), "bus": (220, 40, 40)}


@pytest.fixture
def world(tmp_path):
    """Images of coloured rectangles with masks, and photos of one colour with its name in the file name."""
    rng = np.random.default_rng(0)
    scenes, tagged = tmp_path / "scenes", tmp_path / "tagged"
    for folder in (scenes / "images", scenes / "masks", tagged):
        folder.mkdir(parents=True)
    (scenes / "classes.txt").write_text("\n".join(COLOURS))
    for i in range(12):
        mask = rng.integers(0, 4, (3, 4)).astype(np.uint8).repeat(40, 0).repeat(40, 1)
        noise = rng.normal(0, 12, (*mask.shape, 3))
        pixels = (np.array(list(COLOURS.values()))[mask] + noise).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(scenes / "images" / f"{i:02}.png")
        Image.fromarray(mask).save(scenes / "masks" / f"{i:02}.png")
    for i, name in enumerate(("blue_ball", "green_ball", "bus", "red_ball", "grey_ball")):
        Image.new("RGB", (90, 80), tuple(rng.integers(0, 255, 3).tolist())).save(tagged / f"n{i}_{name}.jpg")
    recipe = {
        "sets": [{"path": "scenes", "weight": 3, "crop": [40, 110], "holdout_every": 4, "exclude": ["00"]}],
        "tagged": [{"path": "tagged", "weight": 1, "crop": [40, 80]}],
        "held_out": ["bus"],
        "held_out_tags": ["bus"],
        "synonyms": {"sky": ["blue sky"], "grass": ["lawn"]},
        "groups": [["n0", "n1", "ball"]],
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return tmp_path


def test_held_out_words_are_in_no_label_and_no_text(world):
    scenes, tagged = load_sets(world, yaml.safe_load((world / "recipe.yaml").read_text()))
    assert scenes.names == [["sky", "blue sky"], ["road"], ["grass", "lawn"], []]
    assert len(scenes) == 9 and not any((mask == 3).any() for mask in scenes.masks)
    assert any((mask == 255).any() for mask in scenes.masks)
    assert tagged.names == [["blue ball", "ball"], ["green ball", "ball"], ["red ball"], ["grey ball"]]


def test_masks_that_do_not_fit_are_refused(world):
    recipe = yaml.safe_load((world / "recipe.yaml").read_text())
    mask = world / "scenes" / "masks" / "05.png"
    good = np.array(Image.open(mask))
    for wrong, message in ((good[:50], "Resize the mask"), (good + 4, "classes.txt has 4 lines")):
        Image.fromarray(wrong).save(mask)
        with pytest.raises(ValueError, match=message):
            load_sets(world, recipe)


def test_a_set_whose_crops_are_all_void_adds_nothing(world):
    """Not NaN, which would end in every weight."""
    for mask in (world / "scenes" / "masks").iterdir():
        Image.fromarray(np.full_like(np.array(Image.open(mask)), 255)).save(mask)
    small = {"window": 32, "hidden_size": 64, "layers": 1, "vocab_size": 400, "batch_size": 4, "text_steps": 5}
    small |= {"steps": 3, "warmup_steps": 1, "workers": 0, "foreign_names": 2}
    folder = train(Options(data=str(world), recipe=str(world / "recipe.yaml"), output=str(world / "void"), **small))
    row = json.loads((world / "void" / "log.jsonl").read_text().splitlines()[0])
    assert row["set0"] == 0 and row["set1"] > 0
    assert all(t.isfinite().all() for t in SparForOpenVocabSegmentation.from_pretrained(folder).state_dict().values())


def test_learns_words_and_resumes(world):
    common = {"data": str(world), "recipe": str(world / "recipe.yaml"), "mixed_precision": "no", "workers": 0}
    common |= {"window": 64, "hidden_size": 64, "layers": 2, "text_layers": 1, "vocab_size": 400, "batch_size": 8}
    common |= {
        "text_steps": 120,
        "foreign_names": 2,
        "warmup_steps": 10,
        "learning_rate": 2e-3,
        "save_steps": 150,
        "steps": 220,
    }
    folder = train(Options(output=str(world / "run"), **common))
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
    resumed = train(Options(output=str(world / "run"), resume=True, **common))
    again = SparForOpenVocabSegmentation.from_pretrained(resumed).state_dict()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(again[name], tensor, atol=1e-6, rtol=1e-5)

    with pytest.raises(ValueError, match="Go on with --resume"):  # or it would mix its checkpoints with these
        train(Options(output=str(world / "run"), **common))
    with pytest.raises(ValueError, match=r"--seed \(was 0, is 1\)"):
        train(Options(output=str(world / "run"), resume=True, **common, seed=1))

    # another run goes on from the finished model: what it knows is kept, its words and sizes stand
    more = common | {"steps": 21, "learning_rate": 1e-4, "output": str(world / "more"), "start": str(folder)}
    with pytest.raises(ValueError, match="leave out --window, --hidden_size"):
        train(Options(**more))
    more = {name: value for name, value in more.items() if name not in FIRST}
    further = SparForOpenVocabSegmentation.from_pretrained(train(Options(**more)))
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
    options = Options(data="", output="", window=64, hidden_size=64, layers=1)
    model = build_model(options, tokenizer)
    reached = teach_words(model, tokenizer, sets, ["street"], str(encoder), steps=60, seed=0)
    assert min(reached.values()) > 0.8
    assert not any(weight.requires_grad for weight in model.text_model.parameters())
