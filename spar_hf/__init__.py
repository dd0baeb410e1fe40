"""
SPAR in Hugging Face Transformers: dense, open-vocabulary vision features at any resolution in one pass.

Importing the package registers its classes with the Auto classes of transformers. It is quiet and safe to repeat.

Example:

```python
>>> import spar_hf
>>> from transformers import AutoModel

>>> model = AutoModel.from_pretrained(spar_hf.SPAR_TINY)
```"""

import sys
from importlib import import_module
from pathlib import Path

if Path(sys.argv[0]).stem == "spar-hf":
    # the console script, whose --help must not wait for torch: its commands load what they need
    def __getattr__(name: str):
        return getattr(import_module(".registration", __name__), name)

else:
    from .registration import *
    from .registration import __all__, __version__
