"""
Runs exported models without PyTorch and transformers: NumPy, Pillow, tokenizers, and ONNX Runtime or OpenVINO.

Example:

```python
>>> from spar_hf.runtime import OnnxSegmenter

>>> segment = OnnxSegmenter("exported")  # doctest: +SKIP
>>> segment("street.jpg", candidate_labels=["road", "car, automobile", "sky"])  # doctest: +SKIP
```"""

from spar_hf.runtime.segmenter import OnnxSegmenter

__all__ = ["OnnxSegmenter"]
