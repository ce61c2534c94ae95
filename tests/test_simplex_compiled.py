"""The softmax family as whole graphs, in processes of their own, since the compiler leaves much behind."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

MODEL = """
import torch
import implicit_layers as il
torch.manual_seed(0)
torch.set_default_dtype(torch.float64)

mine = il.register_regularizer("twice the square", primal=lambda s: s.clamp(min=0) / 4, slope=lambda y: 4 * y,
                               weight=lambda y: torch.full_like(y, 0.25), value=lambda y: 2 * y**2)

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first = torch.nn.Linear(5, 4)
        self.entmax = il.nn.Entmax(learn_alpha=True, learn_temperature=True)
        self.k = torch.nn.Parameter(torch.tensor(1.6))
    def forward(self, x):
        x = self.first(x)
        answers = [il.sparsemax(x), self.entmax(x), il.entmax(x, 2.7), il.entmax(x, self.entmax.alpha + 1.1),
                   il.soft_top_k(x, self.k), il.soft_top_k(x, self.k, regulariser="euclidean", temperature=0.9),
                   il.regularized_argmax(x, "entropy", total=self.k), il.regularized_argmax(x, mine)]
        target = torch.arange(4).expand(*x.shape[:-1], 4).flip(-1).cos().softmax(-1)
        losses = [il.fenchel_young_loss(x, target, regulariser)
                  for regulariser in ("entropy", "euclidean", self.entmax.alpha, "binary_entropy", mine)]
        weights = torch.arange(1.0, 5).cos()
        return sum((i + 1) * (y * weights).sum(-1) for i, y in enumerate(answers)) + sum(losses)

model, x = Model(), torch.randn(6, 5)
def gradients(function, x):
    model.zero_grad()
    function(x).sum().backward()
    return [p.grad.clone() for p in model.parameters()]
"""
COMPILED = """
compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
for x in (x, torch.randn(6, 5)):
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(gradients(compiled, x), gradients(model, x), rtol=1e-9, atol=1e-9)
"""
FUSED = """
def model(x):  # small: the compiler in C++ takes its time
    return il.sparsemax(x) + il.soft_top_k(x, 1.6)
x = x.requires_grad_()
compiled = torch.compile(model, fullgraph=True, backend="inductor")
weights = torch.arange(30.0).cos().reshape(6, 5)
torch.testing.assert_close(compiled(x), model(x), rtol=1e-10, atol=1e-10)
found, expected = (torch.autograd.grad(f(x), x, weights)[0] for f in (compiled, model))
torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
"""
HIGHER = """
from torch.func import grad, hessian, jacfwd, vmap
def scores(x):
    return il.soft_top_k(x, 1.6).square().sum()
def third(x):
    return grad(lambda x: grad(lambda x: grad(scores)(x).square().sum())(x).square().sum())(x)
x = x[:2, :4]
def check(function, x, **options):
    found = torch.compile(function, backend="aot_eager", **options)(x)
    torch.testing.assert_close(found, function(x), rtol=1e-9, atol=1e-9)
check(hessian(scores), x[0], fullgraph=True)
check(vmap(grad(scores)), x, fullgraph=True)
check(third, x[0], fullgraph=True)
check(jacfwd(jacfwd(il.sparsemax)), x[0])  # which the compiler cannot trace: the graph breaks
"""
EXPORTED = """
exported = torch.export.export(model, (x,))
torch.testing.assert_close(exported.module()(x), model(x), rtol=1e-10, atol=1e-10)
names = {str(node.target) for node in exported.graph.nodes}
assert {"implicit_layers.entmax.default", "implicit_layers.choose.default"} <= names, names
"""
SCRIPTS = {
    "aot_eager": COMPILED,
    "inductor": FUSED,
    "derivatives of any order": HIGHER,
    "export": EXPORTED,
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_whole_graph(script: str) -> None:
    root = Path(__file__).parent.parent
    command = [sys.executable, "-W", "ignore", "-c", MODEL + SCRIPTS[script] + '\nprint("done")']
    run = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=900, check=False)
    assert run.returncode == 0 and run.stdout.strip() == "done", run.stderr[-3000:]
