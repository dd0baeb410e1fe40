"""
Exports of models as graphs that run without PyTorch's Python: ONNX, OpenVINO, AOTInductor and ExecuTorch. Each is compared
with PyTorch before it is written.
"""

from spar_hf.export.exporting import export
from spar_hf.export.verification import NotVerified

__all__ = ["NotVerified", "export"]
