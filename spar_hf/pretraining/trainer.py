"""
Pre-train a small SigLIP-shaped pair of towers from scratch, at one fixed resolution: the base of spar-tiny.

Patch features (attention-pooling head without its attention) meet the embeddings of class names, synonyms and templates
in a softmax over names; images that only carry a name train the pooled embedding in the same way. The grid and the
position table are the window's, always: no multi-scale grids, so one pass over a large image suffers as it does for any
ViT pre-trained at one resolution.

    accelerate launch training/pretrain_tiny.py --data DATA --output DIR --text_teacher all-MiniLM-L6-v2
"""

import json
import logging
import math
import random
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import set_seed
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm
from transformers import (
    HfArgumentParser,
    PreTrainedTokenizerFast,
    SiglipTextConfig,
    SiglipVisionConfig,
    get_cosine_schedule_with_warmup,
)

from spar_hf import SparConfig, SparForOpenVocabSegmentation, SparImageProcessorPil, SparProcessor
from spar_hf.data.segmentation_sets import (
    VOID,
    jitter,
    list_images,
    open_segmentation_folder,
    read_image,
    readable_name,
)
from spar_hf.model.prompts import TEMPLATES
from spar_hf.pretraining.words import build_tokenizer, common_words, teach_words
from spar_hf.utils.atomic import writing_folder
from spar_hf.utils.checkpoints import cut_log, earlier_state, load_checkpoint, save_checkpoint, settings_of
from spar_hf.utils.usage import check_precision, work_begins

logger = logging.getLogger("pretrain_tiny")
UNNAMED_WEIGHT = 0.3  # of a pixel of no class against one of a class of mean frequency
LABEL_GRID = 4  # labels are compared on a grid of a quarter of the window's side
# what a resumed run may have otherwise: where it is written, and a schedule of another length
FREE = {"output", "resume", "workers", "save_steps", "steps"}
# options of a first model; one that is gone on from has its own
FIRST = ("window", "hidden_size", "layers", "text_layers", "vocab_size", "text_steps", "text_teacher", "common_words")


@dataclass
class Options:
    """Options of the pre-training; every length is in pixels."""

    data: str = field(metadata={"help": "Folder that the paths of the recipe are relative to."})
    output: str = field(metadata={"help": "Folder to write: checkpoints, log and the finished model."})
    recipe: str = field(
        default=str(Path(__file__).with_name("spar_tiny_data.yaml")),
        metadata={"help": "YAML with the sets, held-out words and synonyms."},
    )
    steps: int = field(default=4000, metadata={"help": "Optimizer steps."})
    batch_size: int = field(default=24, metadata={"help": "Crops per step."})
    learning_rate: float = field(default=6e-4, metadata={"help": "Peak of the one-cycle cosine."})
    weight_decay: float = field(default=0.05, metadata={"help": "AdamW weight decay."})
    warmup_steps: int = field(default=200, metadata={"help": "Steps of linear warm-up."})
    window: int = field(default=192, metadata={"help": "Side of the crops: the model's image_size."})
    hidden_size: int = field(default=192, metadata={"help": "Width of both towers."})
    layers: int = field(default=8, metadata={"help": "Blocks of the vision tower."})
    text_layers: int = field(default=1, metadata={"help": "Blocks of the text tower."})
    start: str | None = field(
        default=None,
        metadata={"help": "Finished model of this script to go on from, sizes and words as they are in it."},
    )
    vocab_size: int = field(default=6144, metadata={"help": "Upper bound of the tokenizer's vocabulary."})
    text_steps: int = field(default=800, metadata={"help": "Steps that first teach the words, without images."})
    text_teacher: str | None = field(
        default=None,
        metadata={
            "help": "Folder of a sentence encoder (all-MiniLM-L6-v2) the words learn from; random codes if none."
        },
    )
    common_words: int = field(default=3500, metadata={"help": "Frequent words of the sentence encoder taught as well."})
    names_per_set: int = field(default=28, metadata={"help": "Names compared per set and step."})
    foreign_names: int = field(default=8, metadata={"help": "Names of other sets added as wrong answers."})
    tagged_names: int = field(default=64, metadata={"help": "Names an image with a name alone is compared with."})
    mixed_precision: str = field(default="no", metadata={"help": "no, bf16 or fp16."})
    workers: int = field(default=1, metadata={"help": "Processes that cut crops."})
    seed: int = field(default=0, metadata={"help": "Seed of weights, order and augmentation."})
    save_steps: int = field(default=500, metadata={"help": "Steps between checkpoints."})
    resume: bool = field(default=False, metadata={"help": "Go on from the last checkpoint in --output."})


class CropSet:
    """
    One set held in memory: cuts a square crop of an image with its labels, from a generator of its own.

    `names[c]` are the words of class `c`; held-out classes have none and their pixels are void.
    """

    def __init__(self, images, masks, names, spec, unnamed=None):
        self.images, self.masks, self.names, self.unnamed = images, masks, names, unnamed
        self.weight, self.crop = spec["weight"], spec["crop"]
        self.images_of: dict[int, list[int]] = {}  # class -> numbers of the images that hold it
        if masks is not None:
            counts = np.stack([np.bincount(mask.ravel(), minlength=256)[: len(names)] for mask in masks])
            if spec.get("even_classes"):
                self.images_of = {c: np.flatnonzero(counts[:, c]).tolist() for c, own in enumerate(names) if own}
                self.images_of = {c: numbers for c, numbers in self.images_of.items() if numbers}
            pixels = counts.sum(0)
            share = np.maximum(pixels / max(pixels.sum(), 1), 1e-5)
            weights = share**-0.35  # rare classes count more, not equally
            self.class_weights = torch.tensor(weights / (weights * share).sum(), dtype=torch.float32).clamp(max=8)

    def __len__(self):
        return len(self.images)

    def cut(self, rng: random.Random, window: int):
        if self.images_of:  # an image of a class drawn evenly: common classes do not crowd out the others
            index = rng.choice(self.images_of[rng.choice(list(self.images_of))])
        else:
            index = rng.randrange(len(self.images))
        source = self.images[index]
        height, width = source.shape[:2]
        low, high = self.crop
        side = min(math.exp(rng.uniform(math.log(low), math.log(high))), height, width)
        aspect = math.exp(rng.uniform(-0.15, 0.15))
        crop_h, crop_w = min(side * aspect, height), min(side / aspect, width)
        top, left = rng.uniform(0, height - crop_h), rng.uniform(0, width - crop_w)
        if self.masks is not None and rng.random() < 0.5:
            # centre on a pixel of a class drawn evenly from those in the image: poles and riders are small
            mask = self.masks[index]
            label = rng.choice([c for c in np.unique(mask[::4, ::4]) if c not in (VOID, self.unnamed)] or [VOID])
            rows, columns = np.nonzero(mask[::4, ::4] == label)
            if len(rows):
                k = rng.randrange(len(rows))
                top = min(max(rows[k] * 4 - crop_h * rng.random(), 0), height - crop_h)
                left = min(max(columns[k] * 4 - crop_w * rng.random(), 0), width - crop_w)
        box = (left, top, left + crop_w, top + crop_h)
        flip = rng.random() < 0.5
        image = np.asarray(Image.fromarray(source).resize((window, window), Image.Resampling.BICUBIC, box=box))
        pixels = torch.from_numpy(image.copy()).permute(2, 0, 1).float() / 255  # (3, window, window)
        pixels = jitter(pixels, rng)
        if self.masks is None:
            label = torch.tensor(index)
        else:
            grid = window // LABEL_GRID
            mask = Image.fromarray(self.masks[index]).resize((grid, grid), Image.Resampling.NEAREST, box=box)
            label = torch.from_numpy(np.asarray(mask).astype(np.int64))  # (grid, grid)
        if flip:
            pixels, label = pixels.flip(-1), label.flip(-1) if label.ndim else label
        return pixels * 2 - 1, label


class CropBatches(Dataset):
    """Item i is batch i: a list with one (pixels, labels) per set. Seeded by (seed, i), whatever the worker."""

    def __init__(self, sets: list[CropSet], options: Options):
        self.sets, self.options = sets, options
        total = sum(s.weight for s in sets)
        self.counts = [max(1, round(options.batch_size * s.weight / total)) for s in sets]

    def __len__(self):
        return self.options.steps

    def __getitem__(self, step: int):
        rng = random.Random(f"{self.options.seed}-{step}")
        groups = []
        for crop_set, count in zip(self.sets, self.counts, strict=True):
            cuts = [crop_set.cut(rng, self.options.window) for _ in range(count)]
            pixels, labels = torch.stack([c[0] for c in cuts]), torch.stack([c[1] for c in cuts])
            if crop_set.masks is not None and rng.random() < 0.3:
                pixels, labels = paste_box(pixels, labels, rng)
            groups.append((pixels, labels))
        return groups


def paste_box(pixels: torch.Tensor, labels: torch.Tensor, rng: random.Random):
    """CutMix (Yun et al., 2019) for label maps: a box of every crop comes from its neighbour in the batch."""
    grid = labels.shape[-1]
    height, width = (rng.randint(grid // 4, grid // 2) for _ in range(2))
    top, left = rng.randint(0, grid - height), rng.randint(0, grid - width)
    labels, pixels, scale = labels.clone(), pixels.clone(), LABEL_GRID
    labels[:, top : top + height, left : left + width] = labels.roll(1, 0)[:, top : top + height, left : left + width]
    rows = slice(top * scale, (top + height) * scale)
    columns = slice(left * scale, (left + width) * scale)
    pixels[:, :, rows, columns] = pixels.roll(1, 0)[:, :, rows, columns]
    return pixels, labels


def load_sets(root: Path, recipe: dict) -> list[CropSet]:
    """Read every set of the recipe into memory, held-out words removed from every label."""
    held_out = {word.lower() for word in recipe["held_out"]}
    synonyms = recipe["synonyms"]
    sets = []
    for spec in recipe["sets"]:
        folder = open_segmentation_folder(root / spec["path"], exclude=spec.get("exclude"))
        every = spec.get("holdout_every", 0)
        pairs = [pair for i, pair in enumerate(folder.pairs) if not every or i % every != every - 1]
        words = [readable_name(name) for name in folder.classes]
        unnamed = spec.get("unnamed")
        if unnamed is not None and unnamed not in words:
            raise ValueError(
                f"{root / spec['path']}: unnamed: {unnamed!r} is no class. Use one of: {', '.join(words)}."
            )
        table = np.full(256, VOID, np.uint8)
        names = []
        for label, word in enumerate(words):
            names.append([] if word in held_out or word == unnamed else [word, *synonyms.get(word, [])])
            table[label] = VOID if word in held_out else label
        if "null" in words:
            names[words.index("null")].remove("null")
        images = [np.asarray(read_image(image)) for image, _ in tqdm(pairs, desc=spec["path"])]
        masks = [
            table[folder.read_mask(mask, source.shape[:2])] for source, (_, mask) in zip(images, pairs, strict=True)
        ]
        sets.append(CropSet(images, masks, names, spec, words.index(unnamed) if unnamed is not None else None))
    for spec in recipe.get("tagged", []):
        hidden = {word.lower() for word in recipe["held_out_tags"]}
        images, names = [], []
        for path in tqdm(list_images(root / spec["path"]), desc=spec["path"]):
            prefix, _, name = path.stem.partition("_")
            if readable_name(name) in hidden:
                continue
            groups = [word for first, last, word in recipe["groups"] if first <= prefix <= last]
            images.append(np.asarray(read_image(path)))
            names.append([readable_name(name), *groups])
        sets.append(CropSet(images, None, names, spec))
    return sets


def build_model(options: Options, tokenizer: PreTrainedTokenizerFast) -> SparForOpenVocabSegmentation:
    size = options.hidden_size
    shape = {"hidden_size": size, "intermediate_size": 4 * size, "num_attention_heads": max(1, size // 64)}
    vision = SiglipVisionConfig(
        image_size=options.window,
        num_hidden_layers=options.layers,
        hidden_act="gelu",
        layer_norm_eps=1e-6,
        **shape,
    )
    text = SiglipTextConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=tokenizer.model_max_length,
        num_hidden_layers=options.text_layers,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        **shape,
    )
    model = SparForOpenVocabSegmentation(SparConfig(backbone_config=vision, text_config=text, dtype="float32"))
    model.set_attn_implementation("eager")  # a fifth faster than sdpa's backward on CPUs at 144 tokens
    with torch.no_grad():
        model.logit_scale.fill_(math.log(model.config.dense_logit_scale))  # the softmax below has no bias to learn
    return model


@torch.no_grad()
def head_start(model: SparForOpenVocabSegmentation) -> None:
    """
    Start the vision tower with attention that looks trained: to alike tokens, taking away their mean, `Q'K ∝ I + noise`
    and `OV ∝ noise - I` (mimetic initialisation, Trockman & Kolter, 2023). With few images a ViT learns faster from there
    than from plain noise.
    """
    backbone = model.vision_model.backbone
    size, heads = backbone.config.hidden_size, backbone.config.num_attention_heads
    identity = torch.eye(size)
    for layer in backbone.encoder.layers:
        attention, width = layer.self_attn, size // heads
        for head in range(heads):
            u, s, v = torch.linalg.svd(0.7 * torch.randn(size, size) / size**0.5 + 0.7 * identity)
            part, root = slice(head * width, (head + 1) * width), s[:width].sqrt()[:, None]
            attention.q_proj.weight[part] = root * u.T[:width]
            attention.k_proj.weight[part] = root * v[:width]
        u, s, v = torch.linalg.svd(0.4 * torch.randn(size, size) / size**0.5 - 0.4 * identity)
        attention.out_proj.weight.copy_(u * s.sqrt())
        attention.v_proj.weight.copy_(s.sqrt()[:, None] * v)


def first_model(
    options: Options, sets: list[CropSet], extra: list[str]
) -> tuple[SparForOpenVocabSegmentation, PreTrainedTokenizerFast]:
    """Towers that have seen no image, the text tower with its words learned, and the tokenizer made for these."""
    if options.text_teacher is not None:
        extra = extra + common_words(options.text_teacher, options.common_words)
    tokenizer = build_tokenizer(sets, extra, options.vocab_size)
    model = build_model(options, tokenizer)
    if not options.resume:
        head_start(model)
        reached = teach_words(model, tokenizer, sets, extra, options.text_teacher, options.text_steps, options.seed)
        logger.info("cosine of text embeddings to their targets: %s", reached)
    return model, tokenizer


def choose_names(sets: list[CropSet], labels: list[torch.Tensor], options: Options, rng: random.Random):
    """
    The words of one step. For each set: the class behind each of its columns, and one prompt per column; columns of
    class -1 are words of other sets, never the right answer.
    """
    templates = [t for group in TEMPLATES.values() for t in group] + ["{}"] * 20
    chosen = []
    for crop_set, label in zip(sets, labels, strict=True):
        if crop_set.masks is None:
            rows = [rng.choice(crop_set.names[int(i)]) for i in label]
            count = min(options.tagged_names, len(crop_set.names))
            others = [rng.choice(names) for names in rng.sample(crop_set.names, count)]
            words = sorted(set(rows) | set(others))
            chosen.append((rows, words, [rng.choice(templates).format(w) for w in words]))
            continue
        present = [int(c) for c in label.unique() if c not in (VOID, crop_set.unnamed)]
        rest = [c for c, names in enumerate(crop_set.names) if names and c not in present]
        rng.shuffle(rest)
        classes = present + rest[: max(0, options.names_per_set - len(present))]
        words = [rng.choice(crop_set.names[c]) for c in classes]
        own = {word for names in crop_set.names for word in names}
        foreign = {rng.choice(names) for s in sets if s is not crop_set for names in s.names if names}
        foreign = [w for w in sorted(foreign - own) if not any(part in own for part in w.split())]
        foreign = rng.sample(foreign, min(options.foreign_names, len(foreign)))
        classes += [-1] * len(foreign)
        chosen.append((classes, words + foreign, [rng.choice(templates).format(w) for w in words + foreign]))
    return chosen


def step_loss(model, tokenizer, sets, groups, options, rng, device):
    """Loss of one step and its parts; the two towers run once each, over all sets together."""
    labels = [group[1] for group in groups]
    chosen = choose_names(sets, labels, options, rng)
    prompts = [prompt for _, _, prompts in chosen for prompt in prompts]
    tokens = tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt")
    pixels = torch.cat([group[0] for group in groups]).to(device)
    outputs = model(pixels, tokens["input_ids"].to(device))
    texts = outputs["text_embeds"].split([len(c[2]) for c in chosen])
    counts = [len(label) for label in labels]
    features, pooled = outputs["feature_map"].split(counts), outputs["pooler_output"].split(counts)
    loss, parts = 0.0, {}
    for i, (crop_set, label) in enumerate(zip(sets, labels, strict=True)):
        label = label.to(device)
        text = nn.functional.normalize(texts[i].float(), dim=-1)
        if crop_set.masks is None:
            image = nn.functional.normalize(pooled[i].float(), dim=-1)
            rows, words, _ = chosen[i]
            target = torch.tensor([words.index(row) for row in rows], device=device)
            part = nn.functional.cross_entropy(image @ text.T * outputs["dense_logit_scale"], target)
        else:
            dense = nn.functional.normalize(features[i].float(), dim=1)
            logits = torch.einsum("bdhw,nd->bnhw", dense, text) * outputs["dense_logit_scale"]
            logits = nn.functional.interpolate(logits, size=label.shape[-2:], mode="bilinear")
            classes = torch.tensor(chosen[i][0])
            column = torch.full((256,), -100)
            column[classes[classes >= 0]] = torch.arange(int((classes >= 0).sum()))
            weights = torch.ones(len(classes))
            weights[classes >= 0] = crop_set.class_weights[classes[classes >= 0]]
            wanted, weights = column.to(device)[label], weights.to(device)
            part = nn.functional.cross_entropy(logits, wanted, weights, reduction="sum")
            total = (weights[wanted.clamp(min=0)] * (wanted >= 0)).sum()
            if crop_set.unnamed is not None and (classes < 0).any():
                # pixels of none of the set's classes: any word of another set is right, together they take the probability
                other = logits.logsumexp(1) - logits[:, classes < 0].logsumexp(1)  # (crops, grid, grid)
                none = (label == crop_set.unnamed) * UNNAMED_WEIGHT
                part, total = part + (other * none).sum(), total + none.sum()
            # the weighted mean, but 0 and no NaN where all crops of the set are void
            part = part / total.clamp(min=1e-6)
        loss = loss + part * counts[i] / sum(counts)
        parts[f"set{i}"] = part.detach()
    return loss, parts


class Towers(nn.Module):
    """Both towers in one forward, so that accelerate can wrap and autocast them together."""

    def __init__(self, model: SparForOpenVocabSegmentation):
        super().__init__()
        self.model = model

    def forward(self, pixel_values, input_ids):
        vision = self.model.vision_model(pixel_values, output_pooled=True)
        return {
            "feature_map": vision.feature_map,
            "pooler_output": vision.pooler_output,
            "text_embeds": self.model.get_text_features(input_ids).pooler_output,
            "dense_logit_scale": self.model.config.dense_logit_scale,
        }


def train(options: Options) -> Path:
    """Run the pre-training; returns the folder of the finished model."""
    given = [name for name in FIRST if getattr(options, name) != getattr(Options, name)]
    if options.start is not None and given:
        raise ValueError(f"--start keeps that model's sizes and words; leave out {', '.join(f'--{n}' for n in given)}.")
    accelerator = Accelerator(mixed_precision=options.mixed_precision)
    check_precision(accelerator)
    set_seed(options.seed)
    torch.set_flush_denormal(True)  # near-zero weights of rare tokens make CPUs several times slower
    output, settings = Path(options.output), settings_of(options, FREE)
    earlier_state(output, options.resume, settings, accelerator.num_processes)
    output.mkdir(parents=True, exist_ok=True)
    recipe = yaml.safe_load(Path(options.recipe).read_text(encoding="utf-8"))
    sets = load_sets(Path(options.data), recipe)
    if options.start is None:
        model, tokenizer = first_model(options, sets, recipe.get("words", []))
    else:
        model = SparForOpenVocabSegmentation.from_pretrained(options.start)
        tokenizer = SparProcessor.from_pretrained(options.start).tokenizer
        options.window = model.config.image_size
    for frozen in (model.text_model, model.logit_scale, model.logit_bias):
        frozen.requires_grad_(False)
    towers = Towers(model)
    trained = [p for p in towers.parameters() if p.requires_grad]
    decay = [p for p in trained if p.ndim > 1]
    plain = [p for p in trained if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": options.weight_decay}, {"params": plain, "weight_decay": 0.0}],
        lr=options.learning_rate,
        betas=(0.9, 0.98),
    )
    schedule = get_cosine_schedule_with_warmup(optimizer, options.warmup_steps, options.steps)
    towers, optimizer = accelerator.prepare(towers, optimizer)
    accelerator.register_for_checkpointing(schedule)
    first = load_checkpoint(accelerator, output)["step"] if options.resume else 0
    if options.resume:
        cut_log(output / "log.jsonl", first - 1)
    batches = CropBatches(sets, options)
    loader = DataLoader(batches, batch_size=None, sampler=range(first, options.steps), num_workers=options.workers)
    log = (output / "log.jsonl").open("a" if options.resume else "w", encoding="utf-8")
    bar = tqdm(loader, initial=first, total=options.steps, disable=not accelerator.is_main_process, mininterval=5)
    work_begins()
    towers.train()
    start = time.time()
    for step, groups in enumerate(bar, start=first):
        rng = random.Random(f"words-{options.seed}-{step}")
        with accelerator.autocast():
            loss, parts = step_loss(towers, tokenizer, sets, groups, options, rng, accelerator.device)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 20 == 0 and accelerator.is_main_process:
            bar.set_postfix(loss=f"{float(loss.detach()):.3f}")
            parts = {name: float(part) for name, part in parts.items()}
            row = {"step": step, "loss": float(loss.detach()), **parts, "seconds": round(time.time() - start, 1)}
            log.write(json.dumps(row) + "\n")
            log.flush()
        if (step + 1) % options.save_steps == 0 and step + 1 < options.steps:
            save_checkpoint(accelerator, output, step + 1, settings=settings)
    log.close()
    model = accelerator.unwrap_model(towers).model
    if accelerator.is_main_process:
        # stored in half precision, which the configuration's dtype turns back into float32 when loading
        half = {name: tensor.half() for name, tensor in model.state_dict().items()}
        working_size = {"shortest_edge": 2 * options.window, "longest_edge": 8 * options.window}
        with writing_folder(output / "model") as temporary:
            model.save_pretrained(temporary, state_dict=half)
            SparProcessor(SparImageProcessorPil(size=working_size), tokenizer).save_pretrained(temporary)
    return output / "model"


def main():
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    (options,) = HfArgumentParser(Options).parse_args_into_dataclasses()
    logger.info("written: %s", train(options))
