"""
Evaluation of open-vocabulary segmentation: mean IoU and boundary IoU, with time and memory, of models on images with masks.

A run is a model in a single pass or by a sliding window, perhaps refined. [`evaluate_runs`] opens the data set, chooses
the words for its classes, loads the models, counts image by image, and returns a report. The command `evaluate` does the
same and prints a table.

Example:

```python
>>> import numpy as np
>>> from pathlib import Path
>>> from PIL import Image
>>> from transformers import SiglipTextConfig, SiglipVisionConfig
>>> from spar_hf import SPAR_TINY, SparConfig, SparForOpenVocabSegmentation, SparProcessor
>>> from spar_hf.evaluation import EvaluationOptions, evaluate_runs

>>> # a tiny model of random weights, with the processor of the embedded one
>>> shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
>>> processor = SparProcessor.from_pretrained(SPAR_TINY)
>>> config = SparConfig(
...     backbone_config=SiglipVisionConfig(image_size=64, **shape),
...     text_config=SiglipTextConfig(vocab_size=8192, bos_token_id=0, eos_token_id=1, projection_size=32, **shape),
...     templates="plain",
... )
>>> SparForOpenVocabSegmentation(config).save_pretrained("student")
>>> files = processor.save_pretrained("student")

>>> # a data set of one image
>>> for folder in ("images", "masks"):
...     Path("street", folder).mkdir(parents=True)
>>> characters = Path("street", "classes.txt").write_text("road\\nsky")
>>> Image.new("RGB", (96, 64), "skyblue").save("street/images/1.png")
>>> Image.fromarray(np.repeat(np.uint8([[1], [0]]), 32, axis=0).repeat(96, axis=1)).save("street/masks/1.png")

>>> options = EvaluationOptions.from_flat(dataset="street", model=["student"], shortest_edge=64)
>>> report = evaluate_runs(options)
>>> report["images"], report["scored_classes"]
(1, ['road', 'sky'])
>>> [(row["model"], row["inference"], 0 <= row["mean_iou"] <= 1) for row in report["runs"]]
[('student', 'single pass', True)]
```"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spar_hf.evaluation.evaluator import evaluate_runs
    from spar_hf.evaluation.metrics import BoundaryIoU, MeanIoU
    from spar_hf.evaluation.options import EvaluationOptions

_MODULES = {
    "evaluate_runs": "evaluator",
    "EvaluationOptions": "options",
    "MeanIoU": "metrics",
    "BoundaryIoU": "metrics",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is used, because only the metrics need the package `evaluate`."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


__all__ = ["BoundaryIoU", "EvaluationOptions", "MeanIoU", "evaluate_runs"]
