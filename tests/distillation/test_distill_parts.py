"""The pieces of the distillation script whose correctness training depends on: options, losses, images, what is trained."""

from pathlib import Path
from random import Random

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from tiny_models import CONFIGS
from torch.nn import functional as F

from spar_hf import SPAR_TINY, SlidingWindowTeacher, SparConfig, SparVisionModel
from spar_hf.distillation.losses import decision_loss, distillation_loss, error_weights, rarity
from spar_hf.distillation.models import Models
from spar_hf.distillation.options import PRESETS, DistillationOptions, TeacherOptions
from spar_hf.distillation.pictures import feature_colours
from spar_hf.distillation.recipes import parse_options
from spar_hf.distillation.targets import Target
from spar_hf.distillation.trainable import BLOCK_PARTS, OTHER_PARTS, choose_parameters, share_frozen
from spar_hf.model.prompts import Vocabulary, embed_names
from spar_hf.utils.errors import UsageError
from spar_hf.utils.labels import parse_labels

CONFIG_FILES = Path(__file__).parents[2] / "training" / "configs"


def options(**kwargs):
    return DistillationOptions.from_flat(**{"model": "m", "images": ["x"], "output": "o", **kwargs})


def test_loss_is_the_mean_squared_error():
    student, target = torch.randn(2, 5, 3, 4), torch.randn(2, 5, 3, 4)
    assert distillation_loss(student, target) == pytest.approx(float((student - target).pow(2).mean()))
    weighted = distillation_loss(student, F.interpolate(target, scale_factor=2), torch.full((6, 8), 0.25))
    assert weighted == pytest.approx(float((student - target).pow(2).mean()), rel=1e-5)


def test_trainable_parameters(vision_model):
    probe = vision_model.backbone.head.probe.numel()  # the pooling query, which dense features do not read
    everything = sum(p.numel() for p in vision_model.parameters()) - probe
    last = sum(p.numel() for p in vision_model.backbone.encoder.layers[1].parameters())
    assert sum(p.numel() for p in choose_parameters(vision_model, "1")) == last
    assert sum(p.numel() for p in choose_parameters(vision_model, "all")) == everything


@pytest.mark.parametrize("readout", [name for name in CONFIGS if name != "siglip"])
@pytest.mark.parametrize("train_layers", ["1", "all"])
def test_what_is_trained_gets_a_gradient_in_every_family(readout, train_layers):
    model = SparVisionModel(SparConfig(backbone_config=CONFIGS[readout](), readout=readout))
    trained = choose_parameters(model, train_layers)
    model(torch.randn(1, 3, 40, 48)).feature_map.square().mean().backward()
    assert trained and all(parameter.grad is not None for parameter in trained)
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    if train_layers == "1":
        assert all(".1." in name for name in names)  # of two blocks the last
    else:
        assert len(names) > 20


def test_decisions_over_words_are_compared():
    """The divergence of the decisions, against torch's of the plain softmaxes; cells of a patch count with their weight."""
    generator = torch.Generator().manual_seed(0)
    student, target = torch.randn(2, 2, 6, 3, 4, generator=generator)
    texts = F.normalize(torch.randn(5, 6, generator=generator), dim=-1)
    softmax = [
        (F.normalize(x, dim=1).permute(0, 2, 3, 1) @ texts.T * 40).flatten(0, 2).softmax(-1) for x in (student, target)
    ]
    expected = F.kl_div(softmax[0].log(), softmax[1], reduction="batchmean")
    torch.testing.assert_close(decision_loss(student, target, texts, 40.0), expected, rtol=1e-3, atol=1e-4)
    assert decision_loss(student, student, texts, 40.0).abs() < 1e-5
    cells = target.repeat_interleave(2, 2).repeat_interleave(2, 3)
    weighted = decision_loss(student, cells, texts, 40.0, torch.full((6, 8), 0.25))
    torch.testing.assert_close(weighted, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("power", [0.5, 1.0])
def test_patches_of_rare_classes_count_more(power):
    """Weights of shares counted place by place; cells of no weight change nothing, and the mean divergence is weighed."""
    generator = torch.Generator().manual_seed(0)
    student, target = torch.randn(2, 1, 6, 3, 4, generator=generator)
    texts = F.normalize(torch.randn(5, 6, generator=generator), dim=-1)
    wanted, found = ((F.normalize(x[0], dim=0).flatten(1).T @ texts.T * 40).softmax(-1) for x in (target, student))
    weights = (wanted * wanted.mean(0) ** -power).sum(-1)
    weights = weights / weights.mean()
    torch.testing.assert_close(rarity(wanted.T.reshape(1, 5, 3, 4), power)[0].flatten(), weights)
    expected = (weights * (wanted * (wanted / found).log()).sum(-1)).mean()
    torch.testing.assert_close(
        decision_loss(student, target, texts, 40.0, balance=power), expected, rtol=1e-3, atol=1e-4
    )
    cells = torch.randn(
        1, 6, 6, 8, generator=generator
    )  # of four cells of a patch the teacher saw one, for all patches
    cells[..., ::2, ::2] = target
    seen = torch.zeros(6, 8)
    seen[::2, ::2] = 1
    sampled = decision_loss(student, cells, texts, 40.0, seen, power)
    torch.testing.assert_close(sampled, expected, rtol=1e-3, atol=1e-4)


def test_each_class_of_an_image_counts_alike_at_full_balance():
    certain = torch.zeros(1, 3, 1, 10)
    certain[0, 0, 0, :7], certain[0, 1, 0, 7:9], certain[0, 2, 0, 9] = 1, 1, 1
    weights = rarity(certain, 1.0)[0, 0]
    torch.testing.assert_close(
        torch.stack([weights[:7].sum(), weights[7:9].sum(), weights[9]]), torch.full((3,), 10 / 3)
    )


def test_whitening_counts_axes_alike():
    """Along an axis of a hundredfold variance an error counts a hundredth at full power, as much at none."""
    noise = torch.randn(1, 2, 40, 40, generator=torch.Generator().manual_seed(0))
    target = noise * torch.tensor([10.0, 1.0]).view(1, 2, 1, 1)
    full, none = error_weights([target], 1.0), error_weights([target], 0.0)
    assert float(full[1, 1] / full[0, 0]) == pytest.approx(10, rel=0.1)
    torch.testing.assert_close(none, torch.eye(2), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("bad", "named"),
    [
        ({"train_layers": "0"}, "--train_layers"),
        ({"train_layers": "x"}, "--train_layers"),
        ({"min_scale": 0.0}, "--min_scale"),
        ({"teacher_windows": 0}, "--teacher_windows"),
        ({"teacher_mode": "sampled"}, "--teacher_windows"),
        ({"teacher_mode": "full", "teacher_windows": 5}, "--teacher_windows"),
        ({"teacher_variant": "windows"}, "--teacher_variant"),
        ({"steps": 5, "epochs": 1.0}, "--epochs"),
        ({"streaming": True, "epochs": 1.0}, "--steps"),
        ({"merge": True}, "--lora_rank"),
        ({"lora_rank": 4, "train_parts": ["readout"]}, "readout"),
        ({"train_parts": ["heads"]}, "heads"),
        ({"whiten": 0.5, "holdout_images": 0}, "--holdout_images"),
        ({"report_to": "paper"}, "tensorboard"),
        ({"mixed_precision": "int8"}, "bf16"),
        ({"lr_scheduler_type": "square"}, "cosine"),
        ({"preset": "spa"}, "spar-all"),
        ({"words": ["cityscape"]}, "--words cityscape: .*cityscapes"),
        ({"words": ["coco-stuff", "road"]}, "--words road: that is one name"),
        ({"words": ["road; Road"]}, "twice"),
        ({"words": ["@missing.txt"]}, "missing.txt"),
        ({"words_weight": -1.0}, "words_weight"),
        ({"words_balance": 1.5, "words": ["voc21"]}, "words_balance"),
        ({"words_balance": 0.5}, "--words"),
        ({"same_size": 2, "streaming": True}, "--same_size"),
        ({"cutmix_probability": 0.5, "streaming": True}, "--cutmix_probability"),
        ({"cutmix_probability": 0.5, "teacher_mode": "cached", "teacher_cache": "c"}, "--cutmix_probability"),
        (
            {"jitter_probability": 1, "jitter_student_only": True, "teacher_mode": "cached", "teacher_cache": "c"},
            "Leave out --jitter_student_only",
        ),
        ({"model_name": "m"}, "model_name"),
    ],
)
def test_bad_options_are_refused_before_work_starts(bad, named):
    with pytest.raises(UsageError, match=named):
        options(**bad)


def test_words_of_a_file_are_in_the_recipe_and_embedded(tmp_path):
    words = tmp_path / "words.txt"
    words.write_text("# streets\nroad\ncar, automobile\n", encoding="utf-16")
    given = options(words=["cityscapes", f"@{words}", "sky; boat"])
    words.unlink()  # a resumed run reads the recipe, and has the same words without the file
    assert given.optimisation.words == ["cityscapes", "road; car, automobile", "sky; boat"]
    models = Models.load(TeacherOptions(model=SPAR_TINY), torch.device("cpu"))
    texts = models.embed_words(given.optimisation.words[1:], torch.device("cpu"))
    embeds = embed_names(
        models.model, models.processor.tokenizer, ["automobile", "car", "road", "boat", "sky"], "short"
    )
    torch.testing.assert_close(torch.cat(texts), embeds, atol=1e-5, rtol=0)
    assert [len(vocabulary) for vocabulary in texts] == [3, 2]


def test_words_that_begin_with_an_at_are_no_file_when_a_recipe_is_read_again(tmp_path):
    file = tmp_path / "words.txt"
    file.write_text("@home\nsky\n")
    given = options(words=[f"@{file}"])
    assert Vocabulary.parse(["@home", "sky"]) == parse_labels(given.optimisation.words[0])
    assert options(**given.flat).optimisation.words == given.optimisation.words


def test_names_that_the_tokenizer_cannot_tell_apart_count_once():
    models = Models.load(TeacherOptions(model=SPAR_TINY), torch.device("cpu"))
    (texts,) = models.embed_words(["Road!; the sky; road; SKY"], torch.device("cpu"))
    expected = embed_names(models.model, models.processor.tokenizer, ["Road!", "SKY", "the sky"], "short")
    torch.testing.assert_close(texts, expected, atol=1e-5, rtol=0)
    for unreadable in ("road; " + "x " * 40, "road; !!!"):
        with pytest.raises(UsageError, match=r"Shorten the name|no token"):
            models.embed_words([unreadable], torch.device("cpu"))
    for alone in ("road;", "road; Road!"):
        with pytest.raises(UsageError, match="fewer than two"):
            models.embed_words(["cityscapes", alone], torch.device("cpu"))


def test_help_names_every_option(capsys):
    with pytest.raises(SystemExit):
        parse_options(["--help"])
    shown = capsys.readouterr().out
    assert all(f"--{name}" in shown for name in options().flat)


def test_earlier_names_give_the_same_options(tmp_path):
    now = options(images=["a"], long_side_windows=3.5, preset="spar")
    given = ["--model", "m", "--images", "a", "--output", "o", "--preset", "spar"]
    assert options(images=["a"], long_side=3.5, preset="spar") == now
    for name in ("--long_side", "--long-side", "--long_side_windows", "--long-side-windows"):
        assert parse_options([*given, name, "3.5"]) == now
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: m\nimages: [a]\noutput: o\npreset: spar\nlong_side: 3.5\n")
    assert parse_options([str(recipe)]) == now
    assert parse_options([str(recipe), "--long_side_windows", "2"]).views.long_side_windows == 2
    recipe.write_text(f"{recipe.read_text()}long_side_windows: 2\n")
    with pytest.raises(UsageError, match="long_side is the earlier name of long_side_windows"):
        parse_options([str(recipe)])


def test_recipes__preset_then_yaml_then_command_line(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "model: m\nimages: [a, b]\noutput: o\npreset: spar-all\nstride: 32\nmerge: false\nteacher_windows: 20\n"
    )
    read = parse_options([str(recipe)])
    assert (read.images.images, read.student.train_layers, read.teacher.stride) == (["a", "b"], "all", 32)
    assert (read.views.long_side_pixels, read.teacher.mode) == (2048, "sampled")
    assert (read.optimisation.epochs, read.optimisation.max_steps, read.optimisation.learning_rate) == (10, None, 2e-5)
    over = parse_options([str(recipe), "--preset", "spar-all-hires", "--steps", "7", "--images", "c", "--stride=16"])
    assert (over.images.images, over.teacher.stride) == (["c"], 16)
    assert (over.views.long_side_pixels, over.views.short_side_pixels, over.views.min_scale) == (2560, 2560, 0.2)
    assert (over.optimisation.steps, over.optimisation.epochs) == (7, None)  # the command line takes precedence
    over = parse_options([str(recipe), "--epochs", "3"])
    assert (over.optimisation.steps, over.optimisation.epochs, over.run.preset) == (None, 3, "spar-all")
    plain = parse_options(["--model", "m", "--images", "a", "--output", "o"])
    assert (plain.optimisation.max_steps, plain.teacher.mode) == (1000, "full")
    assert plain == options(images=["a"])
    assert set(PRESETS) == {"spar", "spar-all", "spar-all-hires", "spar-hf", "spar-hf-siglip"}
    assert PRESETS["spar"]["train_layers"] == "2"
    flat = options(preset="spar-all", images=["a", "b"], stride=32, teacher_windows=20)
    assert flat == parse_options([str(recipe)])
    assert options(preset="spar", steps=3).optimisation.epochs is None
    recipe.write_text("learning_rat: 1\n")
    with pytest.raises(ValueError, match="learning_rat"):
        parse_options([str(recipe)])


@pytest.mark.parametrize(
    ("name", "kind", "cpu", "processes"),
    [
        ("cpu", "NO", True, 1),
        ("one_gpu", "NO", False, 1),
        ("multi_gpu", "MULTI_GPU", False, 2),
        ("fsdp", "FSDP", False, 2),
        ("hsdp", "FSDP", False, 4),
    ],
)
def test_accelerate_reads_the_configurations(name, kind, cpu, processes):
    arguments = launch_command_parser().parse_args(["--config_file", str(CONFIG_FILES / f"{name}.yaml"), "distill.py"])
    found, _, _ = _validate_launch_command(arguments)
    assert (found.use_cpu or found.cpu, found.num_processes) == (cpu, processes)
    assert (bool(found.multi_gpu), bool(found.use_fsdp)) == (kind == "MULTI_GPU", kind == "FSDP")
    assert kind != "FSDP" or str(found.fsdp_version) == "2"
    replicas, shards = int(found.parallelism_config_dp_replicate_size), int(found.parallelism_config_dp_shard_size)
    assert (bool(found.use_parallelism_config), replicas * shards) == ((True, 4) if name == "hsdp" else (False, 1))


PARTS = {
    "position_table",
    "patch_embedding",
    "tokens",
    "readout",
    "attention",
    "mlp",
    "norm",
}  # qkv is within attention


@pytest.mark.parametrize("readout", CONFIGS)
def test_parts_cover_every_family(readout):
    """Every parameter that dense features read lies in exactly one part, of those that the family has."""
    model = SparVisionModel(SparConfig(backbone_config=CONFIGS[readout](), readout=readout))
    whole = {id(p) for p in choose_parameters(model, "all")}
    found: list[int] = []
    for part in PARTS:
        lacking = {"position_table": ("dinov3", "dinov3txt"), "tokens": ("siglip", "naflex"), "readout": ("radio",)}
        if readout in lacking.get(part, ()):
            with pytest.raises(ValueError, match=part):
                choose_parameters(model, "all", [part])
        else:
            found += [id(p) for p in choose_parameters(model, "all", [part])]
    assert set(found) == whole and len(found) == len(whole)
    qkv = {id(p) for p in choose_parameters(model, "all", ["qkv"])}
    assert qkv < {id(p) for p in choose_parameters(model, "all", ["attention"])}
    last = choose_parameters(model, "1", ["mlp", "tokens" if readout == "radio" else "readout"])
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert (
        len(last) == len(names)
        and all(".1.mlp." in n or (".layers." not in n and ".layer." not in n) for n in names)
        and len(names) > 4
    )
    model(torch.randn(1, 3, 40, 48)).feature_map.square().mean().backward()
    assert all(p.grad is not None for p in last)
    assert set(BLOCK_PARTS) | set(OTHER_PARTS) == PARTS | {"qkv"}
    with pytest.raises(ValueError, match="the backbone has 2"):
        choose_parameters(model, "3")


def test_frozen_weights_are_held_once_and_keep_nothing_for_the_gradient(vision_model):
    teacher = SparVisionModel(vision_model.config)
    teacher.load_state_dict(vision_model.state_dict())
    trained = choose_parameters(vision_model, "1")
    with torch.no_grad():
        vision_model.backbone.embeddings.patch_embedding.bias.add_(
            1
        )  # an earlier student may differ where it is frozen
    shared = share_frozen(vision_model, teacher)
    everything = sum(p.numel() for p in vision_model.parameters())
    assert shared == everything - sum(p.numel() for p in trained) - vision_model.config.backbone_config.hidden_size
    pairs = list(zip(vision_model.parameters(), teacher.parameters(), strict=True))
    assert sum(a.numel() for a, b in pairs if a.data_ptr() == b.data_ptr()) == shared
    before = {name: p.clone() for name, p in teacher.named_parameters()}
    saved = []
    for layers in ("all", "1"):
        choose_parameters(vision_model, layers)
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, to=sizes: to.append(x.numel()) or x, lambda x: x):
            loss = vision_model(torch.randn(1, 3, 96, 96)).feature_map.square().mean()
        saved.append(sum(sizes))
    assert saved[1] < 0.65 * saved[0]  # of two blocks the first keeps nothing
    loss.backward()
    torch.optim.SGD(trained, lr=0.1).step()
    assert all(torch.equal(p, before[name]) for name, p in teacher.named_parameters())


def test_targets__full_and_sampled(vision_model):
    teacher = SlidingWindowTeacher(vision_model, stride=32)
    pixels = torch.randn(1, 3, 96, 128)
    target, weight = Target(teacher, TeacherOptions(model="m"), 0)(pixels, 0, (96, 80))
    assert weight is None and torch.equal(target, teacher(pixels).feature_map)
    sampled = TeacherOptions(model="m", teacher_windows=2)
    first, second, *others = (Target(teacher, sampled, 0)(pixels, index, (96, 80)) for index in (5, 5, *range(6, 12)))
    assert torch.equal(first[0], second[0]) and not all(torch.equal(first[1], other[1]) for other in others)
    for variant in ("spread", "tiling"):
        options = TeacherOptions(model="m", teacher_windows=2, teacher_variant=variant)
        drawn = Target(teacher, options, 0)(pixels, 5, (96, 80))
        generator = torch.Generator().manual_seed(Random("windows-0-0-5").getrandbits(62))
        assert all(map(torch.equal, drawn, teacher.sample(pixels, 2, generator, variant)))


def test_pictures_show_equal_features_in_equal_colours():
    rng = torch.Generator().manual_seed(0)
    target = torch.randn(8, 5, 6, generator=rng)
    same, moved = feature_colours([target, target + torch.randn(8, 1, 1, generator=rng)], target)
    assert torch.equal(same, feature_colours([target], target)[0]) and not torch.equal(same, moved)
    # the first axis is the one of the largest variance, as a singular value decomposition finds it
    rows = target.flatten(1).T
    axis = torch.linalg.svd(rows - rows.mean(0)).Vh[0]
    values = (rows - rows.mean(0)) @ axis
    correlation = torch.corrcoef(torch.stack([values, same[0].flatten()]))[0, 1].abs()
    assert correlation > 0.95  # clipped at the ends
