"""
Distillation of a sliding-window teacher into a student that needs one pass, from images without labels.

[`DistillationOptions`] says what to distil; options have the names of the command line, `spar-hf distill --help` lists
them. [`Distillation`] loads and checks everything, and trains. [`TeacherCache`] reads feature maps of the teacher that
`spar-hf cache-teacher` computed before.

Example:

```python
>>> from pathlib import Path
>>> import torch
>>> from PIL import Image
>>> from transformers import AutoModel, SiglipVisionConfig
>>> from spar_hf import SparConfig, SparImageProcessorPil, SparVisionModel
>>> from spar_hf.distillation import Distillation, DistillationOptions

>>> # a tiny random model and four images stand in for a backbone and a folder of photos
>>> sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
>>> config = SparConfig(backbone_config=SiglipVisionConfig(**sizes, image_size=64, patch_size=16))
>>> SparVisionModel(config).save_pretrained("base")
>>> _ = SparImageProcessorPil().save_pretrained("base")
>>> Path("photos").mkdir()
>>> for i in range(4):
...     Image.effect_noise((160, 120), 50).convert("RGB").save(f"photos/{i}.png")

>>> options = DistillationOptions.from_flat(
...     model="base", images=["photos"], output="run", steps=2, teacher_windows=2, holdout_every=4, workers=0
... )
>>> folder = Distillation(options).run()
>>> folder.as_posix()
'run/model'
>>> AutoModel.from_pretrained(folder)(torch.zeros(1, 3, 96, 200)).feature_map.shape
torch.Size([1, 32, 6, 13])
```"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spar_hf.distillation.options import DistillationOptions
    from spar_hf.distillation.teacher_cache import TeacherCache
    from spar_hf.distillation.trainer import Distillation

__all__ = ["Distillation", "DistillationOptions", "TeacherCache"]

_MODULES = {"Distillation": "trainer", "DistillationOptions": "options", "TeacherCache": "teacher_cache"}


def __getattr__(name: str) -> Any:
    """Import the public names when they are first used: they need accelerate and torch."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
