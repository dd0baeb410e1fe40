"""
Measure open-vocabulary segmentation on images with masks: mean IoU, boundary IoU, time and memory of several models, in a
single pass, by a sliding window at any stride, or refined.

    accelerate launch training/evaluate.py --dataset DATA/camvid/train --include "0001TP_*" --shortest_edge 384 \
        --model base=BASE student=STUDENT --runs base:single base:sliding:24 student:single --output result.json
    accelerate launch training/evaluate.py --dataset DATA/VOCdevkit --benchmark voc21 --protocol spar --model STUDENT

A data set is a folder with `images/`, `masks/` (8-bit PNG of the same stem, 255 is ignored) and `classes.txt`, whose class
names are the vocabulary; a benchmark in its published layout; or a Hugging Face data set. `--protocol` sets what a published
evaluation sets. Predictions are compared at the size of the mask.

With `--output`, the same command continues an interrupted measurement. Images are distributed over processes. Without a GPU,
start two with `ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2` (`--cpu` would start only one).
"""

from typing import Any

from accelerate import PartialState
from rich.console import Console

from spar_hf.evaluation.evaluator import evaluate_runs
from spar_hf.evaluation.options import EvaluationOptions


def main(args: list[str] | None = None) -> dict[str, Any]:
    """The command `evaluate`: parse options, measure, print the table. Returns the report."""
    options = EvaluationOptions.parse(args, __doc__)
    options.run.check_windows()
    report = evaluate_runs(options, Console(markup=False, highlight=False))
    PartialState().destroy_process_group()
    return report
