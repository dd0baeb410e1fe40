"""Checks the name of a device before anything is loaded."""

from typing import Any

import torch


def check_device(device: Any) -> None:
    """
    Raises:
        ValueError: an unknown or missing device; the message names those available.
    """
    if not isinstance(device, (str, torch.device)):
        return
    try:
        if torch.empty(0, device=device).is_meta:
            raise RuntimeError("a device without memory")
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:  # differs between back ends
        available = ["cpu"]
        if torch.accelerator.is_available():
            kind = torch.accelerator.current_accelerator()
            available += [f"{kind}:{i}" for i in range(torch.accelerator.device_count())]
        raise ValueError(
            f"Device {str(device)!r} is not available; there is {', '.join(available)}. Use one of these, or leave it out "
            "for the first accelerator."
        ) from error
