"""Optimizers of the pre-training by name."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from spar_hf.utils.errors import UsageError

OPTIMIZERS = ("adamw", "muon")


def check_optimizer(name: str) -> None:
    """
    Refuse an optimizer that this version of torch does not have.

    Raises:
        UsageError: torch is older than 2.9 and `name` is `muon`.
    """
    if name == "muon" and not hasattr(torch.optim, "Muon"):
        raise UsageError(f"--optimizer muon needs torch 2.9 or newer; this is {torch.__version__}.")


class MuonWithAdamW(torch.optim.Optimizer):
    """
    Muon for some weight matrices and AdamW for the rest, as one optimizer: with one learning rate, schedule and state. The
    steps of both are about equally long at the same learning rate.

    Source: Muon (Jordan et al., 2024), its steps scaled as by Liu et al. (arXiv 2502.16982); `torch.optim.Muon`.

    Args:
        matrices: weights of two dimensions, which Muon trains.
        groups: parameters that AdamW trains, or groups of them.
        learning_rate, weight_decay: for both optimizers; a group of AdamW may have its own.
        betas: of AdamW.

    Example:

    ```python
    >>> layer = torch.nn.Linear(4, 4)
    >>> optimizer = MuonWithAdamW([layer.weight], [layer.bias], learning_rate=1e-3, weight_decay=0.0)
    >>> layer(torch.ones(1, 4)).sum().backward()
    >>> optimizer.step()
    ```"""

    def __init__(
        self,
        matrices: Iterable[nn.Parameter],
        groups: Iterable[Any],
        learning_rate: float,
        weight_decay: float,
        betas: tuple[float, float] = (0.9, 0.999),
    ):
        self.parts: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(groups, learning_rate, betas, weight_decay=weight_decay),
            torch.optim.Muon([{"params": list(matrices)}], learning_rate, weight_decay, adjust_lr_fn="match_rms_adamw"),
        ]
        super().__init__([group for part in self.parts for group in part.param_groups], {})
        self._share()

    def _share(self) -> None:
        """Let both parts work on the groups and the state of the whole, which schedules and checkpoints know."""
        first = len(self.parts[0].param_groups)
        self.parts[0].param_groups, self.parts[1].param_groups = self.param_groups[:first], self.param_groups[first:]
        for part in self.parts:
            part.state = self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._share()

    def step(self, closure: Any = None) -> Any:
        adamw, muon = self.parts
        loss = adamw.step(closure)
        muon.step()
        return loss


def make_optimizer(
    name: str,
    blocks: nn.Module,
    groups: list[dict[str, Any]],
    learning_rate: float,
    weight_decay: float,
    betas: tuple[float, float] = (0.9, 0.999),
) -> torch.optim.Optimizer:
    """
    An optimizer over groups of parameters.

    Args:
        name: `adamw`; or `muon`, which trains the weight matrices of the `blocks` with Muon and the rest with AdamW.
        blocks: transformer blocks of the model.
        groups: each with `params`, and perhaps a `weight_decay` of its own, which holds for what AdamW trains.
        learning_rate, weight_decay, betas: as in [`MuonWithAdamW`].
    """
    if name == "adamw":
        return torch.optim.AdamW(groups, learning_rate, betas, weight_decay=weight_decay)
    inside = {id(parameter) for parameter in blocks.parameters() if parameter.ndim == 2}
    matrices = [parameter for group in groups for parameter in group["params"] if id(parameter) in inside]
    rest = [{**group, "params": [p for p in group["params"] if id(p) not in inside]} for group in groups]
    return MuonWithAdamW(matrices, rest, learning_rate, weight_decay, betas)
