"""The words of spar-tiny: a tokenizer, and a text tower that learns them before any image is seen."""

import random

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import nn
from tqdm.auto import tqdm
from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerFast, get_cosine_schedule_with_warmup

from spar_hf.model.prompts import TEMPLATES

PROMPT_TEMPLATES = [template for group in TEMPLATES.values() for template in group] + ["{}"] * 20
LENGTH = 24  # tokens of a prompt


def build_tokenizer(sets: list, extra: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on names and templates: lower case, no punctuation, padded right to `LENGTH`."""
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
    return fast_tokenizer(tokenizer)


def fast_tokenizer(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """A tokenizer of `build_tokenizer` for transformers."""
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        padding_side="right",
        model_max_length=LENGTH,
        model_input_names=["input_ids"],
    )


@torch.no_grad()
def encode_sentences(folder: str, sentences: list[str]) -> torch.Tensor:
    """Sentence embeddings `(sentences, dim)` of a BERT-like encoder in a local folder: mean-pooled, of unit length."""
    tokenizer, encoder = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    embeddings = []
    for start in tqdm(range(0, len(sentences), 512), desc="sentence encoder"):
        tokens = tokenizer(sentences[start : start + 512], padding=True, truncation=True, return_tensors="pt")
        mask = tokens["attention_mask"][..., None]  # (batch, length, 1)
        embeddings.append((encoder(**tokens).last_hidden_state * mask).sum(1) / mask.sum(1))
    return nn.functional.normalize(torch.cat(embeddings), dim=-1)


def common_words(folder: str, count: int) -> list[str]:
    """The most frequent whole words of a BERT vocabulary, which is sorted by frequency."""
    vocabulary = AutoTokenizer.from_pretrained(folder).get_vocab()
    ranked = sorted(vocabulary, key=vocabulary.__getitem__)
    return [word for word in ranked if word.isascii() and word.isalpha() and len(word) > 2][:count]


def word_targets(
    sets: list, extra: list[str], dim: int, text_teacher: str | None, seed: int
) -> tuple[list[str], torch.Tensor, int]:
    """
    The text embedding that each word is to get.

    With `text_teacher` these are its sentence embeddings, centred and projected to their first principal axes, so that a
    word that labels nothing lies near words of similar meaning that do. Without it every word has a random direction.
    Either way all words of a class get the mean of the class.

    Args:
        sets: give the words that label pixels and images.
        extra: words that label nothing.
        dim: width of the text embeddings.
        text_teacher: folder of a sentence encoder.
        seed: of random directions.

    Returns:
        The words; unit vectors `(words, dim)`; and how many of the words, the first ones, label something.
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
        codes = codes @ axes.T  # (words, dim of the teacher) -> (words, axes)
        codes = nn.functional.pad(codes, (0, dim - codes.shape[1]))  # (words, dim), also with fewer axes
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
    """Initialise the text tower as the mean of its token embeddings; a word that is one token has its target there."""
    text, vocabulary, size = model.text_model, tokenizer.get_vocab(), model.config.hidden_size
    text.embeddings.token_embedding.weight.normal_(0, 0.02)
    text.embeddings.position_embedding.weight.normal_(0, 0.02)
    for word, target in zip(words, targets, strict=True):
        if (token := vocabulary.get("\u0120" + word)) is not None:  # a leading space in byte-level BPE
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
    Train the text tower to give prompts of each word the word's target, then freeze it.

    With random weights all texts have nearly the same embedding, and so have all patches. Between two collapsed spaces the
    softmax over names has almost no gradient. Training images against a frozen tower that separates words is LiT (Zhai et
    al., 2022) with the roles exchanged.

    Returns:
        Mean cosine of embeddings and targets, for words that label pixels, all that label anything, and the rest.
    """
    rng = random.Random(f"text-{seed}")
    words, targets, labels = word_targets(sets, extra, model.config.projection_dim, text_teacher, seed)
    start_from_words(model, tokenizer, words, targets)
    row = {word: i for i, word in enumerate(words)}
    # words that label pixels are drawn most often: they are in the first two groups
    dense = {word for crop_set in sets if crop_set.masks is not None for names in crop_set.names for word in names}
    groups = [sorted(row[word] for word in dense), list(range(labels)), list(range(labels, len(words)))]
    optimizer = torch.optim.AdamW(model.text_model.parameters(), lr=1e-3, betas=(0.9, 0.98))
    schedule = get_cosine_schedule_with_warmup(optimizer, min(30, steps), steps)
    for _ in tqdm(range(steps), desc="teaching words", mininterval=5):
        chosen = [i for group in groups for i in rng.sample(group, min(43, len(group)))]
        texts = embed_prompts(model, tokenizer, [rng.choice(PROMPT_TEMPLATES).format(words[i]) for i in chosen])
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
        reached = (embed_prompts(model, tokenizer, words) * targets).sum(1)
        parts = zip(("dense", "labels", "others"), groups, strict=True)
        return {name: round(float(reached[part].mean()), 4) for name, part in parts if part}


def embed_prompts(model, tokenizer, prompts: list[str]) -> torch.Tensor:
    """Text embeddings of unit length, `(prompts, hidden_size)`."""
    tokens = tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt")["input_ids"]
    return nn.functional.normalize(model.get_text_features(tokens).pooler_output, dim=-1)
