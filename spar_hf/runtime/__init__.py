"""
Runs exported models without PyTorch and transformers: NumPy, Pillow, tokenizers, and ONNX Runtime or OpenVINO. See
`docs/runtime.md`.
"""

from spar_hf.runtime.segmenter import OnnxSegmenter

__all__ = ["OnnxSegmenter"]
