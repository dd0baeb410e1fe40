"""Muon and AdamW as one optimizer, against torch's own two."""

import copy

import pytest
import torch
from torch import nn

from spar_hf.pretraining.optimizers import MuonWithAdamW, make_optimizer

pytestmark = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has Muon from 2.9 on")
RATES = {"learning_rate": 0.02, "weight_decay": 0.1}


class Model(nn.Module):
    """Two blocks after an embedding, which is a matrix that belongs to no block."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(7, 6)
        self.blocks = nn.Sequential(nn.Linear(6, 12), nn.LayerNorm(12), nn.Linear(12, 6))

    def forward(self, numbers):
        return self.blocks(self.table(numbers))


def groups_of(model):
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.ndim > 1]},
        {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
    ]


def train(model, optimizers, steps=4, first=0, schedule=None):
    for step in range(first, first + steps):
        loss = model(torch.tensor([step % 7, 3])).square().sum()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if schedule is not None:
            schedule.step()
    return model


def halving(optimizer):
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)


def test_the_steps_are_those_of_torchs_optimizers():
    model, plain = Model(), Model()
    optimizer = make_optimizer("muon", model.blocks, groups_of(model), **RATES)
    train(model, [optimizer], schedule=halving(optimizer))

    matrices = [plain.blocks[0].weight, plain.blocks[2].weight]
    vectors = [p for p in plain.parameters() if p.ndim == 1]
    own = [
        torch.optim.Muon(matrices, 0.02, 0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW([plain.table.weight], 0.02, weight_decay=0.1),
        torch.optim.AdamW(vectors, 0.02, weight_decay=0.0),
    ]
    schedules = [halving(part) for part in own]
    for step in range(4):
        train(plain, own, steps=1, first=step)
        for schedule in schedules:
            schedule.step()
    for name, weight in plain.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight), name


def test_a_stored_state_goes_on_to_the_last_bit():
    whole, half = Model(), Model()
    train(whole, [MuonWithAdamW([whole.blocks[0].weight], groups_of_rest(whole), **RATES)], steps=6)
    optimizer = MuonWithAdamW([half.blocks[0].weight], groups_of_rest(half), **RATES)
    train(half, [optimizer], steps=3)
    state, resumed = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(half)
    again = MuonWithAdamW([resumed.blocks[0].weight], groups_of_rest(resumed), **RATES)
    again.load_state_dict(state)
    train(resumed, [again], steps=3, first=3)
    for name, weight in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], weight), name


def groups_of_rest(model):
    return [p for name, p in model.named_parameters() if name != "blocks.0.weight"]


def test_frozen_matrices_stay_as_they_are():
    model = Model()
    model.blocks[0].requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    trained = [{"params": [p for p in model.parameters() if p.requires_grad]}]
    train(model, [make_optimizer("muon", model.blocks, trained, **RATES)], steps=1)
    same = {name for name, weight in before.items() if torch.equal(weight, model.state_dict()[name])}
    assert same == {"blocks.0.weight", "blocks.0.bias"}
    only_matrices = [{"params": [model.blocks[2].weight]}]
    train(model, [make_optimizer("muon", model.blocks, only_matrices, **RATES)], steps=1)
    only_vectors = [{"params": [model.blocks[2].bias]}]
    train(model, [make_optimizer("muon", model.blocks, only_vectors, **RATES)], steps=1)
