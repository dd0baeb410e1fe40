"""
Prompt templates: sets of them, and templates of each name. The runtime without torch reads them too, so this file imports
neither torch nor transformers.
"""

import json
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TEMPLATES_FORMAT = "spar templates, 1"  # of the file of a `TemplateChoice`

# The 80 prompts that CLIP (Radford et al., 2021) uses for ImageNet; SPAR averages over them.
IMAGENET80 = (
    "a bad photo of a {}.",
    "a photo of many {}.",
    "a sculpture of a {}.",
    "a photo of the hard to see {}.",
    "a low resolution photo of the {}.",
    "a rendering of a {}.",
    "graffiti of a {}.",
    "a bad photo of the {}.",
    "a cropped photo of the {}.",
    "a tattoo of a {}.",
    "the embroidered {}.",
    "a photo of a hard to see {}.",
    "a bright photo of a {}.",
    "a photo of a clean {}.",
    "a photo of a dirty {}.",
    "a dark photo of the {}.",
    "a drawing of a {}.",
    "a photo of my {}.",
    "the plastic {}.",
    "a photo of the cool {}.",
    "a close-up photo of a {}.",
    "a black and white photo of the {}.",
    "a painting of the {}.",
    "a painting of a {}.",
    "a pixelated photo of the {}.",
    "a sculpture of the {}.",
    "a bright photo of the {}.",
    "a cropped photo of a {}.",
    "a plastic {}.",
    "a photo of the dirty {}.",
    "a jpeg corrupted photo of a {}.",
    "a blurry photo of the {}.",
    "a photo of the {}.",
    "a good photo of the {}.",
    "a rendering of the {}.",
    "a {} in a video game.",
    "a photo of one {}.",
    "a doodle of a {}.",
    "a close-up photo of the {}.",
    "a photo of a {}.",
    "the origami {}.",
    "the {} in a video game.",
    "a sketch of a {}.",
    "a doodle of the {}.",
    "a origami {}.",
    "a low resolution photo of a {}.",
    "the toy {}.",
    "a rendition of the {}.",
    "a photo of the clean {}.",
    "a photo of a large {}.",
    "a rendition of a {}.",
    "a photo of a nice {}.",
    "a photo of a weird {}.",
    "a blurry photo of a {}.",
    "a cartoon {}.",
    "art of a {}.",
    "a sketch of the {}.",
    "a embroidered {}.",
    "a pixelated photo of a {}.",
    "itap of the {}.",
    "a jpeg corrupted photo of the {}.",
    "a good photo of a {}.",
    "a plushie {}.",
    "a photo of the nice {}.",
    "a photo of the small {}.",
    "a photo of the weird {}.",
    "the cartoon {}.",
    "art of the {}.",
    "a drawing of the {}.",
    "a photo of the large {}.",
    "a black and white photo of a {}.",
    "the plushie {}.",
    "a dark photo of a {}.",
    "itap of a {}.",
    "graffiti of the {}.",
    "a toy {}.",
    "itap of my {}.",
    "a photo of a cool {}.",
    "a photo of a small {}.",
    "a tattoo of the {}.",
)

TEMPLATES: dict[str, tuple[str, ...]] = {
    "imagenet80": IMAGENET80,
    "short": ("a photo of a {}.", "a photo of the {}.", "a bright photo of the {}.", "a dark photo of the {}."),
    "plain": ("{}",),
    # of TCL (Cha et al., 2023), which TIPSv2's zero-shot segmentation uses
    "tcl": (
        "itap of a {}.",
        "a bad photo of a {}.",
        "a origami {}.",
        "a photo of the large {}.",
        "a {} in a video game.",
        "art of the {}.",
        "a photo of the small {}.",
        "a photo of many {}.",
        "a photo of {}s.",
    ),
}


def normalise_name(name: str) -> str:
    """A name for comparison: lower case, single spaces. Text towers hardly tell such differences apart."""
    return " ".join(name.lower().split())


def resolve_templates(templates: Any) -> tuple[str, ...]:
    """
    The templates of a set in `TEMPLATES`, a list of templates as it is, or the default ones of a [`TemplateChoice`] or of
    the file of one.

    Raises:
        FileNotFoundError, ValueError: as [`TemplateChoice.load`].
        ValueError: an unknown set, an empty list, or a template without exactly one `{}`.
    """
    templates = read_templates(templates)
    if isinstance(templates, str):
        if templates not in TEMPLATES:
            raise ValueError(
                f"Unknown template set {templates!r}; use one of {sorted(TEMPLATES)}, a list, ['a photo of a {{}}.'], or a "
                "JSON file of `choose_templates`, which chooses them for each class."
            )
        return TEMPLATES[templates]
    templates = tuple(templates)
    if not templates or any(template.count("{}") != 1 for template in templates):
        raise ValueError(f"Every template needs exactly one {{}} for the name, got {list(templates)}.")
    return templates


@dataclass(frozen=True)
class TemplateChoice:
    """
    Prompt templates for each name, in place of one set for all: the pipeline takes it, or the file of it, as `templates`.

    Attributes:
        default: templates of all other names.
        names: templates of a name, however it is spelled (upper case, spaces).
    """

    default: tuple[str, ...]
    names: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def __iter__(self) -> Iterator[str]:
        """The default templates: where a set of templates is expected, it is that one."""
        return iter(self.default)

    def by_name(self) -> dict[str, tuple[str, ...]]:
        """Templates by the names as [`normalise_name`] writes them."""
        return {normalise_name(name): prompts for name, prompts in self.names.items()}

    def rows_of(self, names: Sequence[str], embed: Callable[[list[str], tuple[str, ...]], Iterable[Any]]) -> list[Any]:
        """What `embed` returns for each name, given names and the templates that they share."""
        groups: dict[tuple[str, ...], list[str]] = {}
        chosen = self.by_name()
        for name in names:
            groups.setdefault(chosen.get(normalise_name(name), self.default), []).append(name)
        rows = {n: row for prompts, some in groups.items() for n, row in zip(some, embed(some, prompts), strict=True)}
        return [rows[name] for name in names]

    def save(self, path: str | os.PathLike) -> None:
        """Write it to a JSON file."""
        content = {"format": TEMPLATES_FORMAT, "default": self.default, "names": self.names}
        target = Path(path)
        temporary = target.with_name(f".{os.getpid()}-{threading.get_ident()}.partial")
        try:
            temporary.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "TemplateChoice":
        """
        Read a file that `save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: another kind of file, or a template without exactly one `{}`.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"{str(path)!r} does not exist. Write it with `choose_templates(…).save`.")
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            if content["format"] != TEMPLATES_FORMAT:
                raise ValueError("of another format")
            names = {name: resolve_templates(templates) for name, templates in content["names"].items()}
            return cls(resolve_templates(content["default"]), names)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{str(path)!r} is no file of `choose_templates`: {error}. Write it again.") from error


def read_templates(templates: Any) -> Any:
    """
    Templates as the pipeline takes them; the name of a JSON file becomes its [`TemplateChoice`], and an iterator, which can
    be read once only, a tuple.
    """
    if isinstance(templates, Iterator):
        return tuple(templates)
    if isinstance(templates, os.PathLike) or (isinstance(templates, str) and templates.endswith(".json")):
        return TemplateChoice.load(templates)
    return templates
