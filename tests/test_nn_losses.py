"""The loss modules hold settings and call one function."""

import copy
import pickle

import pytest
import torch

import implicit_layers as il

X = torch.tensor([[0.3, -1.0, 2.0], [0.0, 0.5, 0.25]])
HARD = torch.tensor([2, -100])
SOFT = torch.tensor([[0.5, 0.25, 0.25], [0.0, 0.0, 1.0]])


@pytest.mark.parametrize(
    ("module", "regulariser", "total"),
    [
        (il.nn.FenchelYoungLoss, "entropy", 1),
        (il.nn.SparsemaxLoss, "euclidean", 1),
        (il.nn.EntmaxLoss, 1.5, 1),
        (lambda **more: il.nn.EntmaxLoss(1.2, **more), 1.2, 1),
        (lambda **more: il.nn.SoftTopKLoss(2, **more), "binary_entropy", 2),
        (lambda **more: il.nn.SoftTopKLoss(2, regulariser="euclidean", **more), "box", 2),
    ],
    ids=["entropy", "sparsemax", "entmax 1.5", "entmax 1.2", "top-k", "top-k, euclidean"],
)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_it_calls_the_function(module, regulariser, total, reduction):
    loss = module(dim=-1, temperature=0.5, reduction=reduction)
    targets = [1 - SOFT] if total == 2 else [SOFT, HARD]
    for target in targets:
        expected = il.fenchel_young_loss(X, target, regulariser, temperature=0.5, total=total, reduction=reduction)
        assert torch.equal(loss(X, target), expected)
    for twin in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert torch.equal(twin(X, targets[0]), loss(X, targets[0])) and repr(twin) == repr(loss)


def test_a_mask_and_the_default_reduction():
    mask = torch.tensor([True, False, True])
    expected = il.fenchel_young_loss(X, HARD, "euclidean", mask=mask, reduction="mean")
    assert torch.equal(il.nn.SparsemaxLoss()(X, HARD, mask), expected)


def test_a_classifier_learns_with_it():
    torch.manual_seed(0)
    data = torch.randn(200, 4)
    classes = (data @ torch.randn(4, 3)).argmax(-1)
    model, loss = torch.nn.Linear(4, 3), il.nn.EntmaxLoss()
    optimiser = torch.optim.Adam(model.parameters(), lr=0.1)
    for _ in range(100):
        optimiser.zero_grad()
        loss(model(data), classes).backward()
        optimiser.step()
    assert float((model(data).argmax(-1) == classes).float().mean()) > 0.95


def test_repr_and_refusals():
    assert repr(il.nn.SparsemaxLoss()) == "SparsemaxLoss('euclidean', dim=-1, temperature=1, reduction='mean')"
    expected = "SoftTopKLoss('binary_entropy', dim=-1, temperature=1, total=2, reduction='sum')"
    assert repr(il.nn.SoftTopKLoss(2, reduction="sum")) == expected
    for settings in ({"regulariser": "none"}, {"reduction": "none at all"}, {"temperature": 0}, {"regulariser": 0.5}):
        with pytest.raises(ValueError, match="must be"):
            il.nn.FenchelYoungLoss(**settings)
