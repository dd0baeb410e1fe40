"""Targets of the student: the full teacher, a sample of its windows, or maps that were computed before."""

import random

import torch
from torch.utils.data import Dataset

from spar_hf import SlidingWindowTeacher
from spar_hf.data.order import Sample, is_excluded
from spar_hf.data.training_images import LoadedSample
from spar_hf.distillation.models import sped_up
from spar_hf.distillation.options import TeacherOptions
from spar_hf.distillation.teacher_cache import TeacherCache
from spar_hf.utils.errors import UsageError, as_usage_errors
from spar_hf.utils.sample_record import same_files


class Target:
    """
    The target of an image: the mean over all windows of the teacher, or with `--teacher_windows` an unbiased estimate from
    about so many. The draw depends on the seed and the image's number in the stream: it is the same after a resume and on
    any number of processes. Cached maps come with their images instead, see [`CachedImages`].

    With `--teacher_dtype` the windows run on a copy of the encoder in that precision. `teacher` stays as it is: the held-out
    error is measured against it, so that runs of any precision can be compared.
    """

    def __init__(self, teacher: SlidingWindowTeacher, options: TeacherOptions, seed: int):
        self.teacher, self.seed = sped_up(teacher, options), seed
        self.windows, self.variant = options.teacher_windows, options.teacher_variant
        self.scales_for = options.scales_for
        self.generator = torch.Generator()

    def __call__(
        self, pixel_values: torch.Tensor, index: int, whole_size: tuple[float, float]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        The full map `(1, dim, h, w)` and `None`, or cells and their weights as [`SlidingWindowTeacher.sample`] returns them;
        `index` is the image's number in the stream, `whole_size` that of a [`LoadedSample`].

        Raises:
            UsageError: the image is too large for the teacher's stride.
        """
        with as_usage_errors():
            scales = self.scales_for(whole_size)
            if self.windows is None:
                return self.teacher(pixel_values, scales=scales).feature_map, None
            draw = random.Random(f"windows-{self.seed}-0-{index}").getrandbits(62)
            generator = self.generator.manual_seed(draw)
            return self.teacher.sample(pixel_values, self.windows, generator, self.variant, scales)


class CachedImages(Dataset):
    """
    The images of a teacher cache with their targets. It lists [`Sample`]s for [`MapOrder`], and as a data set loads them.

    An image or shard that changed ends the training, because its target would belong to something else.

    Args:
        cache: of the teacher.
        held_out: paths or URLs of the images that are held out.
        exclude: patterns of names, see `--exclude`.

    Raises:
        UsageError: the cache contains an image that is held out or excluded.
    """

    def __init__(self, cache: TeacherCache, held_out: list[str], exclude: list[str]):
        self.cache = cache
        paths = [str(cache.image(i)) for i in range(len(cache))]
        if excluded := next((path for path in paths if exclude and is_excluded(path, exclude)), None):
            raise UsageError(
                f"The teacher cache {cache.folder} contains images that --exclude leaves out, such as {excluded}. Give the "
                "--exclude that it was made with, or make another cache."
            )
        if not set(same_files(paths)).isdisjoint(same_files(held_out)):
            raise UsageError(
                f"The teacher cache {cache.folder} contains images that are held out here. Give the --images, --exclude and "
                "--holdout_every that it was made with."
            )

    def __len__(self) -> int:
        return len(self.cache)

    def sample(self, i: int, index: int, after: list[int]) -> Sample:
        """Map `i` as the `index`-th image of the stream."""
        return Sample(index, str(self.cache.image(i)), i, after)

    def __getitem__(self, sample: Sample) -> LoadedSample:
        pixel_values, target = self.cache[sample.source]
        return LoadedSample(sample.index, pixel_values, sample.after, target=target)
