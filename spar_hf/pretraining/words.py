"""The words of spar-tiny: a tokenizer of our own, and a text tower that is taught before any image is seen."""

import random

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import nn
from tqdm.auto import tqdm
from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerFast, get_cosine_schedule_with_warmup

from spar_hf.model.prompts import TEMPLATES


def build_tokenizer(sets: list, extra: list[str], vocab_size: int, length: int = 24) -> PreTrainedTokenizerFast:
    """A byte-level BPE of our own over names and templates: lower case, no punctuation, padded right to `length`."""
    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.NFKC(),
            normalizers.Lowercase(),
            normalizers.Replace(Regex(r"[^\p{L}\p{N}\s]+"), " "),
            normalizers.Replace(Regex(r"\s+"), " "),
            normalizers.Strip(),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<pad>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    corpus = [word for crop_set in sets for words in crop_set.names for word in words] * 3 + extra * 2
    corpus += [template.replace("{}", "") for templates in TEMPLATES.values() for template in templates] * 5
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        padding_side="right",
        model_max_length=length,
        model_input_names=["input_ids"],
    )


@torch.no_grad()
def encode_sentences(folder: str, sentences: list[str]) -> torch.Tensor:
    """Mean-pooled, normalised sentence embeddings `(sentences, dim)` of a BERT-like encoder in a local folder."""
    tokenizer, encoder = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    embeddings = []
    for start in tqdm(range(0, len(sentences), 512), desc="sentence encoder"):
        tokens = tokenizer(sentences[start : start + 512], padding=True, truncation=True, return_tensors="pt")
        mask = tokens["attention_mask"][..., None]  # (batch, length, 1)
        embeddings.append((encoder(**tokens).last_hidden_state * mask).sum(1) / mask.sum(1))
    return nn.functional.normalize(torch.cat(embeddings), dim=-1)


def common_words(folder: str, count: int) -> list[str]:
    """The first whole words of a BERT vocabulary, which is sorted by how often they occur."""
    vocabulary = AutoTokenizer.from_pretrained(folder).get_vocab()
    ranked = sorted(vocabulary, key=vocabulary.__getitem__)
    return [word for word in ranked if word.isascii() and word.isalpha() and len(word) > 2][:count]


def word_targets(
    sets: list, extra: list[str], dim: int, text_teacher: str | None, seed: int
) -> tuple[list[str], torch.Tensor, int]:
    """
    Where each word's embedding belongs: the words, `(words, dim)` unit vectors, and how many of the words
    (the first ones) name a class.

    With `text_teacher` these are its sentence embeddings, centred and taken to their first principal axes, of the label
    words and of `extra`: a word without labels then lies near words that have some. Without it every class has a
    random direction. Synonyms share the mean of their class either way.
    """
    classes = [names for crop_set in sets if crop_set.masks is not None for names in crop_set.names if names]
    classes += [[word] for crop_set in sets if crop_set.masks is None for names in crop_set.names for word in names]
    labels = sorted({word for names in classes for word in names})
    words = labels + sorted(set(extra) - set(labels))
    if text_teacher is None:
        codes = torch.randn(len(words), dim, generator=torch.Generator().manual_seed(seed))
    else:
        codes = encode_sentences(text_teacher, words)
        codes = codes - codes.mean(0)
        axes = torch.linalg.svd(codes, full_matrices=False).Vh[:dim]
        codes = codes @ axes.T  # (words, teacher's dim) -> (words, axes)
        codes = nn.functional.pad(codes, (0, dim - codes.shape[1]))  # -> (words, dim), where there are fewer axes
    codes = nn.functional.normalize(codes, dim=-1)
    row = {word: i for i, word in enumerate(labels)}
    targets = codes.clone()
    targets[: len(labels)] = 0
    for names in classes:
        rows = [row[word] for word in names]
        targets[rows] += codes[rows].mean(0)
    return words, nn.functional.normalize(targets, dim=-1), len(labels)


@torch.no_grad()
def start_from_words(model, tokenizer, words: list[str], targets: torch.Tensor) -> None:
    """Start the text tower as an average of its tokens, each whole word's token at the word's target."""
    text, vocabulary, size = model.text_model, tokenizer.get_vocab(), model.config.hidden_size
    text.embeddings.token_embedding.weight.normal_(0, 0.02)
    text.embeddings.position_embedding.weight.normal_(0, 0.02)
    for word, target in zip(words, targets, strict=True):
        if (token := vocabulary.get("\u0120" + word)) is not None:  # byte-level BPE writes a leading space so
            text.embeddings.token_embedding.weight[token] = target
    for layer in text.encoder.layers:
        layer.self_attn.v_proj.weight.copy_(torch.eye(size))
        layer.self_attn.out_proj.weight.copy_(0.5 * torch.eye(size) + 0.01 * torch.randn(size, size))
        layer.self_attn.q_proj.weight.mul_(0.5)
        layer.mlp.fc2.weight.mul_(0.1)
    text.head.weight.copy_(torch.eye(size))


def teach_words(
    model, tokenizer, sets: list, extra: list[str], text_teacher: str | None, steps: int, seed: int
) -> dict[str, float]:
    """
    Before any image: the text tower learns where prompts of each word belong; afterwards it is frozen.

    From random weights all texts have nearly one embedding, and so have all patches; between two collapsed spaces the
    softmax over names has next to no gradient. Training images against a locked tower that tells words apart is LiT
    (Zhai et al., 2022) with the roles exchanged. Returns the mean cosine to the targets of label words and of the rest.
    """
    rng = random.Random(f"text-{seed}")
    words, targets, labels = word_targets(sets, extra, model.config.projection_dim, text_teacher, seed)
    start_from_words(model, tokenizer, words, targets)
    row = {word: i for i, word in enumerate(words)}
    # words that label pixels come most often, then words of whole images, then the others
    dense = {word for crop_set in sets if crop_set.masks is not None for names in crop_set.names for word in names}
    groups = [sorted(row[word] for word in dense), list(range(labels)), list(range(labels, len(words)))]
    templates = [t for group in TEMPLATES.values() for t in group] + ["{}"] * 20
    optimizer = torch.optim.AdamW(model.text_model.parameters(), lr=1e-3, betas=(0.9, 0.98))
    schedule = get_cosine_schedule_with_warmup(optimizer, min(30, steps), steps)
    for _ in tqdm(range(steps), desc="teaching words", mininterval=5):
        chosen = [i for group in groups for i in rng.sample(group, min(43, len(group)))]
        texts = embed_prompts(model, tokenizer, [rng.choice(templates).format(words[i]) for i in chosen])
        different = sorted(set(chosen))
        column = torch.tensor([different.index(i) for i in chosen])
        cosines = texts @ targets[different].T  # (prompts, different words)
        loss = nn.functional.cross_entropy(cosines * model.config.dense_logit_scale, column)
        loss = loss + 10 * (1 - cosines.gather(1, column[:, None])).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(model.text_model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.text_model.requires_grad_(False)
    with torch.no_grad():
        return {
            name: round(
                float((embed_prompts(model, tokenizer, [words[i] for i in part]) * targets[part]).sum(1).mean()), 4
            )
            for name, part in zip(("dense", "labels", "others"), groups, strict=True)
            if part
        }


def embed_prompts(model, tokenizer, prompts: list[str]) -> torch.Tensor:
    """Unit text embeddings `(prompts, hidden_size)`."""
    tokens = tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt")["input_ids"]
    return nn.functional.normalize(model.get_text_features(tokens).pooler_output, dim=-1)
