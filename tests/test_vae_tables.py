"""The tables of the semi-amortised VAE say what is in the results."""

from __future__ import annotations

from benchmarks.tables import vae_comparison, vae_gradients, vae_grid
from benchmarks.train_vae import paired

ENVIRONMENT = {"device": "a processor", "threads": 1, "torch": "2.13.0", "commit": "0123abc", "date": "2026-01-31"}


def row(method: str, seed: int, gap: float, rho: float = 1.0) -> dict:
    figures = {f"{kind}_{tested}": gap + seed for kind in ("nll", "gap") for tested in ("plain", "refined", "trained")}
    more = {
        "kl": 1.5,
        "information": 1.25,
        "active": 2,
        "train_seconds": 12.3,
        "graph_kib": 45.6,
        "failed_share": 0.001,
    }
    return {"method": method, "seed": seed, "rho": rho, "exact_nll": 9.0 + gap, **figures, **more}


def result(rows: list[dict], rho: object = 1.0, fixed: bool = True) -> dict:
    settings = {"epochs": 3, "fixed": fixed, "rho": rho, "precision": "float32"}
    data = {"source": "sequences", "train": 100, "test": 20}
    return {"environment": ENVIRONMENT, "rows": rows, "paired": paired(rows), "settings": settings, "data": data}


def test_the_fairness_table():
    rows = [row(name, seed, gap) for seed in (0, 1) for name, gap in (("savi_implicit", 0.5), ("vae", 2.0))]
    text = vae_comparison(result(rows))
    assert text.index("| VAE | 2.50 | 2.50 | 2.50 | 1.50 | 1.25 | 2.00 | 12 | 46 |") < text.index("SAVI")
    assert "| SAVI, implicit | 1.00 (-1.50: -1.50 to -1.50) |" in text
    assert "At most 0.1% of the inner problems failed" in text and "--data sequences --fixed" in text
    assert "seeds)" not in text and "| SAVI, implicit (1 seeds) |" in vae_comparison(result(rows[1:]))
    learned = vae_comparison(result(rows, fixed=False))
    assert "exact NLL" in learned and "| 11.00 | 1.50 |" in learned and "exact gap" not in learned


def test_the_grid():
    rows = [row("vae", 0, 2.0), row("savi_implicit", 0, 0.5, 0.3), row("savi_implicit", 0, 1.0, 3.0)]
    text = vae_grid(result(rows, rho=[0.3, 3.0]))
    assert "In brackets" not in text
    assert "| 0.3 | 0.500 | 0.500 | 0.25 | 1.50 | 12 |" in text and "| 3 | 1.000 | 1.000 | 0.50 | 1.50 | 12 |" in text
    assert "| ∞ (VAE) | 2.000 | 2.000 | 1.00 | 1.50 | 12 |" in text


def test_costs_and_where_they_cross():
    costs = []
    for way in ("unrolled", "implicit", "frozen_hessian", "envelope"):
        for k in (10, 20, 40):
            size, ms = (k, 2.0 * k) if way == "unrolled" else (3, 15.0 + k)
            costs.append({"way": way, "steps": k, "bytes": 1024 * size, "ms": ms})
    costs.append({"way": "implicit, Newton", "steps": 0, "bytes": 7, "ms": 33.3})
    orders = {"slopes": {"envelope": 1.01, "implicit": 2.02, "unrolled": 1.93}}
    text = vae_gradients({"suite": "vae-gradients", "environment": ENVIRONMENT, "costs": costs, "orders": orders})
    assert "| 20 | 20 | 3 | 3 | 3 | 40.0 | 35.0 | 35.0 | 35.0 |" in text
    assert "from K = 20 on" in text and "R² = 1.0000" in text and "are 1.00 times" in text
    assert "envelope 1.01, implicit 2.02, unrolled 1.93" in text and "33 ms" in text
