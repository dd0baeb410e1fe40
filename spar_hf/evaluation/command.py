"""
Mean intersection over union of open-vocabulary segmentation on images with masks: one pass, a sliding window at any
stride, refined; several models and ways side by side with boundary IoU, times and memory.

    accelerate launch training/evaluate.py --dataset DATA/camvid/train --include "0001TP_*" --shortest_edge 720 \
        --model base=BASE student=STUDENT --runs base:single base:sliding:24 student:single --output result.json
    accelerate launch training/evaluate.py --dataset DATA/VOCdevkit --benchmark voc21 --protocol spar --model STUDENT

A folder holds `images/`, `masks/` (8-bit PNG of the same stem, 255 = void) and `classes.txt`; its class names are the
vocabulary. Benchmarks are read from their usual folders, Hugging Face data sets by their columns (`benchmarks.py`), and
`--protocol` sets what a published evaluation sets (`protocols.py`). Predictions are scored at the size of the mask.

With `--output`, a measurement that was cut off goes on where it stopped when the same command is given again. Images are
split over processes, each image once; without a GPU, two are started with
`ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2` (`--cpu` would start only one).
"""

from typing import Any

from accelerate import PartialState
from rich.console import Console
from transformers import HfArgumentParser

from spar_hf.evaluation.evaluator import evaluate_runs
from spar_hf.evaluation.options import Options


def main(args: list[str] | None = None) -> dict[str, Any]:
    (options,) = HfArgumentParser(Options, description=__doc__).parse_args_into_dataclasses(args)
    report = evaluate_runs(options, Console(markup=False, highlight=False))
    PartialState().destroy_process_group()
    return report
