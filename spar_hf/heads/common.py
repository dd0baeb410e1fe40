"""What the training of a probe and that of a panoptic head share."""

from spar_hf.data.segmentation_sets import SegmentationSet


def file_names(data: SegmentationSet) -> list[str]:
    """Names of the images of a set, for the record of a run; numbers where they are no files."""
    files = (data.file(number) for number in range(len(data)))
    return [str(number) if isinstance(file, bytes) else str(file) for number, file in enumerate(files)]
