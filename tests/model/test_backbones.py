"""One suite for every read-out: tests the capabilities that its class declares."""

import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import BLOCKS, CONFIGS, GRID, SHAPE, randomise
from torch.export import Dim
from transformers import (
    AutoBackbone,
    AutoModel,
    CLIPConfig,
    CLIPModel,
    CLIPVisionModelWithProjection,
    DINOv3ViTModel,
    MetaClip2Config,
    MetaClip2Model,
    Siglip2Config,
    Siglip2Model,
    SiglipConfig,
    SiglipModel,
    Tipsv2Config,
    Tipsv2Model,
)

from spar_hf import SlidingWindowTeacher, SparBackbone, SparConfig, SparForOpenVocabSegmentation, SparVisionModel
from spar_hf.model.readouts import READOUTS

# native grid, as many patches in another shape, portrait, no multiples
SIZES = [(32, 32), (16, 64), (64, 16), (35, 39), (51, 23)]

pytestmark = pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects")


def random_images(size, batch=2):
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(sum(size)))


def make(readout: str) -> SparVisionModel:
    torch.manual_seed(0)
    return randomise(SparVisionModel(SparConfig(backbone_config=CONFIGS[readout](), readout=readout)))


@pytest.fixture(params=list(READOUTS))
def model(request) -> SparVisionModel:
    return make(request.param)


def needs(model, flag: str) -> None:
    if not getattr(model.backbone, flag):
        pytest.skip(f"{type(model.backbone).__name__}.{flag} is False")


@pytest.mark.parametrize("size", SIZES)
@torch.no_grad()
def test_any_resolution(model, size):
    needs(model, "any_resolution")
    outputs = model(random_images(size), output_pooled=True)
    rows, columns = -(-size[0] // 8), -(-size[1] // 8)
    assert outputs.feature_map.shape == (2, model.config.projection_dim, rows, columns)
    assert outputs.feature_map.isfinite().all() and outputs.pooler_output.isfinite().all()


@torch.no_grad()
def test_every_patch_describes_its_own_pixels(model):
    """Painting over a patch changes the feature of that patch most, for every size of the image."""
    for name, weight in model.named_parameters():  # random attention mixes all patches; trained attention does less
        if ".layer" in name and ("out_proj" in name or "o_proj" in name):
            weight *= 0.02
    for size in [(35, 39), (40, 40), (43, 36)]:
        image = random_images(size, batch=1)
        before = model(image).feature_map
        for row, column in [(0, 0), (17, 9), (34, 35)]:
            painted = image.clone()
            painted[:, :, row : row + 2, column : column + 2] += 25
            change = (model(painted).feature_map - before).norm(dim=1)[0]
            assert divmod(int(change.argmax()), change.shape[1]) == (row // 8, column // 8)


@torch.no_grad()
def test_an_edge_stays_where_the_object_ends(model):
    """The features that a rectangle changes lie within one patch of it, with cropping and padding too."""
    for name, weight in model.named_parameters():  # see above
        if ".layer" in name and ("out_proj" in name or "o_proj" in name):
            weight *= 0.02
    image = random_images((75, 91), batch=1)
    painted = image.clone()
    painted[:, :, 20:52, 28:69] += 25
    for height, width in [(75, 91), (72, 88), (70, 83), (80, 96)]:
        edges = [0, max(0, width - 91), 0, max(0, height - 75)]  # a few pixels more on the right and below
        pair = [torch.nn.functional.pad(x, edges)[:, :, :height, :width] for x in (image, painted)]
        change = (model(pair[0]).feature_map - model(pair[1]).feature_map).norm(dim=1)[0]
        found = (change > 0.5 * change.max()).repeat_interleave(8, 0).repeat_interleave(8, 1)[:height, :width]
        rows, columns = found.any(1).nonzero().flatten(), found.any(0).nonzero().flatten()
        box = torch.stack([rows[0], rows[-1] + 1, columns[0], columns[-1] + 1])
        assert (box - torch.tensor([20, 52, 28, 69])).abs().max() < 8, (height, width, box)


@torch.no_grad()
def test_saved_models_are_the_same_in_a_fresh_process(tmp_path):
    """One process for all: it takes seconds to start."""
    models = {readout: make(readout) for readout in READOUTS}
    for readout, model in models.items():
        model.save_pretrained(tmp_path / readout)
    save_file({"pixels": random_images((35, 39))}, tmp_path / "in.safetensors")
    code = (
        "import sys, torch, spar_hf; from transformers import AutoModel\n"
        "from safetensors.torch import load_file, save_file\n"
        "pixels, found = load_file(sys.argv[1] + '/in.safetensors')['pixels'], {}\n"
        "for readout in sys.argv[2:]:\n"
        "    model = AutoModel.from_pretrained(sys.argv[1] + '/' + readout)\n"
        "    with torch.no_grad(): out = model(pixels, output_pooled=True)\n"
        "    found |= {readout + '.map': out.feature_map, readout + '.pooled': out.pooler_output}\n"
        "save_file({k: v.contiguous() for k, v in found.items()}, sys.argv[1] + '/out.safetensors')"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path), *models], check=True)
    found = load_file(tmp_path / "out.safetensors")
    for readout, model in models.items():
        expected = model(random_images((35, 39)), output_pooled=True)
        torch.testing.assert_close(found[f"{readout}.map"], expected.feature_map, atol=1e-5, rtol=0)
        torch.testing.assert_close(found[f"{readout}.pooled"], expected.pooler_output, atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_batch_equals_its_images(model):
    batch = random_images((35, 39), batch=3)
    singles = torch.cat([model(image[None]).feature_map for image in batch])
    torch.testing.assert_close(model(batch).feature_map, singles, atol=1e-5, rtol=0)


@torch.no_grad()
def test_eager_equals_sdpa(model):
    assert type(model.backbone)._supports_sdpa
    pixels = random_images((35, 39))
    model.set_attn_implementation("sdpa")
    expected = model(pixels, output_pooled=True)
    model.set_attn_implementation("eager")
    found = model(pixels, output_pooled=True)
    torch.testing.assert_close(found.feature_map, expected.feature_map, atol=1e-5, rtol=0)
    torch.testing.assert_close(found.pooler_output, expected.pooler_output, atol=1e-5, rtol=0)


@torch.no_grad()
def test_compiles_as_one_graph(model):
    needs(model, "compilable")
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="eager")
    for size in [(40, 56), *SIZES]:
        torch.testing.assert_close(
            compiled(random_images(size)).feature_map, model(random_images(size)).feature_map, atol=1e-5, rtol=0
        )


@torch.no_grad()
def test_strict_export_holds_for_all_sizes(model):
    needs(model, "exportable")
    sides = {2: Dim("height", min=9, max=4096), 3: Dim("width", min=9, max=4096)}
    program = torch.export.export(
        model, (), kwargs={"pixel_values": random_images((43, 59))}, dynamic_shapes={"pixel_values": sides}, strict=True
    )
    exported = program.module()
    for size in SIZES:
        found = exported(pixel_values=random_images(size)).feature_map
        torch.testing.assert_close(found, model(random_images(size)).feature_map, atol=1e-5, rtol=0)


def test_gradient_checkpointing_gives_the_same_gradients(model):
    assert type(model.backbone).supports_gradient_checkpointing
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.activation_checkpointing_enable()
        model.train().zero_grad()
        model(random_images((35, 39))).feature_map.square().mean().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) > 20
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_half_precision_is_close(model, dtype):
    needs(model, "half_precision")
    expected = model(random_images((35, 39))).feature_map
    found = model.to(dtype)(random_images((35, 39))).feature_map
    assert found.dtype == dtype
    limit = {torch.float16: 0.01, torch.bfloat16: 0.06}[dtype]
    assert (found.float() - expected).norm() / expected.norm() < limit


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_half_precision_sums_tokens_in_float32_from_block_to_block(model, dtype):
    needs(model, "half_precision")
    outputs = model.to(dtype)(random_images((35, 39)), output_hidden_states=True, output_pooled=True)
    assert {state.dtype for state in outputs.hidden_states} == {torch.float32}
    assert {outputs.last_hidden_state.dtype, outputs.feature_map.dtype, outputs.pooler_output.dtype} == {dtype}


@torch.no_grad()
def test_training_mode_is_deterministic(model):
    expected = model(random_images((35, 39))).feature_map
    torch.testing.assert_close(model.train()(random_images((35, 39))).feature_map, expected, atol=0, rtol=0)


@torch.no_grad()
def test_hidden_states_are_those_of_the_layers(model):
    outputs = model(random_images((35, 39)), output_hidden_states=True)
    assert len(outputs.hidden_states) == 1 + model.config.num_hidden_layers
    tokens = outputs.last_hidden_state.shape[1]
    assert all(state.shape == (2, tokens, 32) for state in outputs.hidden_states)


@torch.no_grad()
def test_backbone_gives_the_chosen_stages(model, tmp_path):
    model.save_pretrained(tmp_path)
    backbone = SparBackbone.from_pretrained(tmp_path, out_features=["stem", "stage2", "features"])
    maps = backbone(random_images((35, 39))).feature_maps
    outputs = model(random_images((35, 39)), output_hidden_states=True)
    assert backbone.channels == [32, 32, model.config.projection_dim]
    assert [tuple(m.shape) for m in maps] == [(2, channels, 5, 5) for channels in backbone.channels]
    torch.testing.assert_close(maps[2], outputs.feature_map, atol=1e-6, rtol=0)
    patches = outputs.last_hidden_state[:, -25:].transpose(1, 2).reshape(2, 32, 5, 5)
    torch.testing.assert_close(maps[1], patches, atol=1e-6, rtol=0)
    anew = AutoBackbone.from_config(model.config)
    assert isinstance(anew, SparBackbone) and anew.out_features == ["features"]


def two_tower_sources():
    text = SHAPE | {"vocab_size": 40, "max_position_embeddings": 12, "eos_token_id": 39, "bos_token_id": 0}
    vision = SHAPE | GRID
    clip = {"vision_config": vision | {"projection_dim": 24}, "text_config": text | {"projection_dim": 24}}
    return {
        "siglip": (SiglipModel, SiglipConfig(vision_config=vision, text_config=text)),
        "naflex": (
            Siglip2Model,
            Siglip2Config(vision_config=SHAPE | {"patch_size": 8, "num_patches": 16}, text_config=text),
        ),
        "maskclip": (CLIPModel, CLIPConfig(**clip, projection_dim=24)),
        "metaclip2": (MetaClip2Model, MetaClip2Config(**clip, projection_dim=24)),
        "tipsv2": (Tipsv2Model, Tipsv2Config(vision_config=BLOCKS | GRID, text_config=text)),
    }


@pytest.mark.parametrize("name", two_tower_sources())
@torch.no_grad()
def test_two_towers_come_straight_from_a_backbone(name, tmp_path):
    source_class, config = two_tower_sources()[name]
    source = randomise(source_class(config))
    source.save_pretrained(tmp_path / "base")
    model = SparForOpenVocabSegmentation.from_backbone(str(tmp_path / "base"))
    assert model.config.readout == name
    ids = torch.randint(3, 39, (4, 12), generator=torch.Generator().manual_seed(0))
    ids[:, -1] = 39
    expected = source.get_text_features(ids).pooler_output
    torch.testing.assert_close(model.get_text_features(ids).pooler_output, expected, atol=1e-5, rtol=0)

    pixels = random_images((32, 32))
    if name == "naflex":  # patches with the channel last, in rows
        patches = pixels.view(2, 3, 4, 8, 4, 8).permute(0, 2, 4, 3, 5, 1).reshape(2, 16, -1)
        inputs = {"pixel_values": patches, "pixel_attention_mask": torch.ones(2, 16, dtype=torch.int64)}
        inputs["spatial_shapes"] = torch.tensor([[4, 4], [4, 4]])
    else:
        inputs = {"pixel_values": pixels}
    pooled = model.vision_model(pixels, output_pooled=True).pooler_output
    torch.testing.assert_close(pooled, source.get_image_features(**inputs).pooler_output, atol=1e-5, rtol=0)

    model.save_pretrained(tmp_path / "spar")
    again = SparForOpenVocabSegmentation.from_backbone(str(tmp_path / "spar"))  # a SPAR folder loads as it is
    with pytest.raises(ValueError, match="configuration of its own"):
        SparForOpenVocabSegmentation.from_backbone(str(tmp_path / "spar"), spar_config={"templates": "short"})
    for key, tensor in model.state_dict().items():
        torch.testing.assert_close(again.state_dict()[key], tensor)


@torch.no_grad()
def test_naflex_equals_transformers_at_another_aspect(tmp_path):
    """Tokens of transformers' NaFlex model for a 48×24 image, passed as patches with their spatial shape."""
    source_class, config = two_tower_sources()["naflex"]
    source = randomise(source_class(config))
    source.save_pretrained(tmp_path)
    pixels = random_images((48, 24))
    patches = pixels.view(2, 3, 6, 8, 3, 8).permute(0, 2, 4, 3, 5, 1).reshape(2, 18, -1)
    expected = source.vision_model(
        pixel_values=patches,
        pixel_attention_mask=torch.ones(2, 18, dtype=torch.int64),
        spatial_shapes=torch.tensor([[6, 3], [6, 3]]),
    ).last_hidden_state
    found = SparVisionModel.from_backbone(str(tmp_path))(pixels).last_hidden_state
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_vision_models_come_straight_from_a_backbone(tmp_path):
    source = randomise(DINOv3ViTModel(CONFIGS["dinov3"]()))
    source.save_pretrained(tmp_path / "dino")
    model = SparVisionModel.from_backbone(str(tmp_path / "dino"))
    expected = source(random_images((40, 24))).last_hidden_state[:, 5:].transpose(1, 2).reshape(2, 32, 5, 3)
    torch.testing.assert_close(model(random_images((40, 24))).feature_map, expected, atol=1e-5, rtol=0)
    teacher = SlidingWindowTeacher(model, stride=12)
    assert teacher(random_images((40, 48))).feature_map.shape == (2, 32, 5, 6)

    source = randomise(CLIPVisionModelWithProjection(CONFIGS["maskclip"]()))
    source.save_pretrained(tmp_path / "clip")
    model = SparVisionModel.from_backbone(str(tmp_path / "clip"))
    pooled = model(random_images((32, 32)), output_pooled=True).pooler_output
    torch.testing.assert_close(pooled, source(random_images((32, 32))).image_embeds, atol=1e-5, rtol=0)


@torch.no_grad()
def test_half_precision_is_the_same_from_a_backbone_and_from_its_saved_folder(tmp_path):
    """RoPE's frequencies are not saved and stay float32: rounded to half precision they would shift positions."""
    randomise(DINOv3ViTModel(CONFIGS["dinov3"]())).save_pretrained(tmp_path / "dinov3")
    model = SparVisionModel.from_backbone(tmp_path / "dinov3", dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "spar")
    again = SparVisionModel.from_pretrained(tmp_path / "spar", dtype=torch.bfloat16)
    pixels = random_images((35, 39))
    assert model.dtype == torch.bfloat16
    assert torch.equal(model(pixels).feature_map, again(pixels).feature_map)


def test_two_towers_need_a_text_tower(tmp_path):
    DINOv3ViTModel(CONFIGS["dinov3"]()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no text tower"):
        SparForOpenVocabSegmentation.from_backbone(str(tmp_path))


def test_another_model_type_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="SPAR reads siglip"):
        SparVisionModel.from_backbone(str(tmp_path))


def test_missing_weights_of_a_backbone_are_an_error(tmp_path):
    source = DINOv3ViTModel(CONFIGS["dinov3"]())
    weights = source.state_dict()
    weights.pop("norm.weight")
    source.save_pretrained(tmp_path, state_dict=weights)
    with pytest.raises(RuntimeError, match=r"norm\.weight"):
        SparVisionModel.from_backbone(str(tmp_path))


@torch.no_grad()
def test_each_family_has_its_own_positions():
    """Each family's resampling gives different positions from the same table."""
    from spar_hf.model.positions import resample_positions

    table = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))
    grid = table.view(4, 4, 8).permute(2, 0, 1)[None]
    resize = torch.nn.functional.interpolate
    for rows, columns in [(4, 4), (2, 8), (7, 3), (3, 2), (9, 11)]:
        expected = {
            "bicubic": resize(grid, size=(rows, columns), mode="bicubic"),
            "bilinear_antialias": resize(grid, size=(rows, columns), mode="bilinear", antialias=True),
            "bicubic_antialias": resize(grid, size=(rows, columns), mode="bicubic", antialias=True),
            "bilinear_corner": resize(grid, size=2 * [max(rows, columns)], mode="bilinear")[:, :, :rows, :columns],
            "bicubic_offset": resize(grid, scale_factor=((rows + 0.1) / 4, (columns + 0.1) / 4), mode="bicubic"),
        }
        if (rows, columns) == (4, 4):
            expected["bicubic_offset"] = grid
        for method, positions in expected.items():
            found = resample_positions(table, rows, columns, method)
            torch.testing.assert_close(found, positions[0].flatten(1).T, atol=1e-5, rtol=1e-5)


def test_auto_model_is_silent_about_a_two_tower_folder(tmp_path, transformers_log):
    source_class, config = two_tower_sources()["maskclip"]
    source_class(config).save_pretrained(tmp_path / "base")
    SparForOpenVocabSegmentation.from_backbone(str(tmp_path / "base")).save_pretrained(tmp_path / "spar")
    transformers_log.clear()
    assert isinstance(AutoModel.from_pretrained(tmp_path / "spar"), SparVisionModel)
    assert transformers_log == []
