"""The scripts that train on real data run, count what they say they count, and do not look ahead."""

import json

import pytest
import torch

from benchmarks import digit_pairs, sparse_attention


@pytest.mark.parametrize(
    ("script", "key", "names"),
    [
        (digit_pairs, "head", list(digit_pairs.HEADS)),
        (sparse_attention, "attention", list(sparse_attention.ATTENTIONS)),
    ],
)
def test_a_quick_run_writes_a_row_for_each(script, key, names, tmp_path):
    assert script.main(["--quick", "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*-quick.json")
    result = json.loads(path.read_text(encoding="utf-8"))
    assert result["quick"] is True and [row[key] for row in result["rows"]] == names
    assert all(isinstance(value, (int, float)) for row in result["rows"] for name, value in row.items() if name != key)


def test_a_pair_shows_both_of_its_digits():
    images = torch.arange(3.0).reshape(3, 1).expand(3, 64)  # picture i is all i
    pictures, targets = digit_pairs.pairs(images, torch.tensor([4, 7, 7]), 50, torch.Generator().manual_seed(0))
    assert pictures.shape == (50, 128) and bool((targets.sum(-1) == 2).all())
    halves = pictures.reshape(50, 8, 2, 8).mean((1, 3)).round()
    assert all({int(a > 0), int(b > 0)} == {0, 1} for a, b in halves)  # a 4 and a 7, never twice the same


def test_the_gradients_of_the_losses_at_the_scores_are_answer_minus_target():
    scores = torch.randn(6, 10, generator=torch.Generator().manual_seed(0)).double().requires_grad_()
    target = torch.zeros(6, 10).double()
    target[:, :2] = 1.0
    for head in ("soft_top_k, Fenchel-Young", "capped_simplex, Fenchel-Young"):
        (g,) = torch.autograd.grad(digit_pairs.HEADS[head](scores, target), scores)
        answer = 6 * g + target
        torch.testing.assert_close(answer.sum(-1), torch.full((6,), 2.0).double())
        assert answer.min() > -1e-9 and answer.max() < 1 + 1e-9


def test_attention_sees_no_later_letter():
    data = sparse_attention.text()
    assert data.letters > 50 and len(data.test) > 10_000
    model = sparse_attention.Transformer(sparse_attention.ATTENTIONS["sparsemax"], data.letters)
    letters, following = sparse_attention.windows(data.test, torch.tensor([5]))
    assert torch.equal(letters[0, 1:], following[0, :-1])
    changed = letters.clone()
    changed[0, 40:] = 0
    before, after = model(letters), model(changed)
    torch.testing.assert_close(before[0, :40], after[0, :40])
    assert not torch.allclose(before[0, 40:], after[0, 40:])
