"""Failed problems become one error or one warning that says what, where, by how much, and what to do."""

from __future__ import annotations

import linecache
import warnings

import pytest
import torch

from implicit_layers.errors import (
    ConvergenceError,
    ConvergenceWarning,
    ImplicitLayersError,
    InfeasibleError,
    SingularAdjointError,
    SolveError,
    UnboundedError,
)
from implicit_layers.solution import Solution, SolveInfo, Status, check_on_failure, report_failure


def outcome(status, *, residual: float = 2.1e-3, iterations: int = 50) -> SolveInfo:
    """An outcome whose failed problems have this residual; `status` is a number or a nested list of them."""
    status = torch.tensor(status, dtype=torch.int8)
    converged = status == Status.CONVERGED
    return SolveInfo(
        status,
        converged,
        torch.full(status.shape, iterations),
        torch.where(converged, 1e-12, residual).to(torch.float64),
    )


def report(info: SolveInfo, on_failure="raise") -> None:
    report_failure(info, on_failure, what="solve_qp", tol=1e-10, max_iter=50)


def message(info: SolveInfo, error: type[SolveError] = ConvergenceError) -> str:
    with pytest.raises(error) as caught:
        report(info)
    return str(caught.value)


@pytest.mark.parametrize("status", [0, [0, 0, 0], [], [[], []], [[0], [0]]])
@pytest.mark.parametrize("on_failure", ["raise", "warn", "ignore"])
def test_success_is_silent(status, on_failure):
    report(outcome(status), on_failure)


@pytest.mark.parametrize(
    ("status", "error", "says"),
    [
        (Status.NOT_CONVERGED, ConvergenceError, "did not converge"),
        (Status.INFEASIBLE, InfeasibleError, "has no feasible point"),
        (Status.UNBOUNDED, UnboundedError, "decreases without limit"),
        (Status.SINGULAR, SingularAdjointError, "singular"),
    ],
)
def test_each_failure_has_its_own_error(status, error, says):
    assert says in message(outcome([0, status]), error)
    assert issubclass(error, SolveError) and issubclass(error, ImplicitLayersError) and issubclass(error, RuntimeError)


def test_every_status_but_success_can_be_reported():
    for status in Status:
        if status != Status.CONVERGED:
            message(outcome(int(status)), SolveError)


def test_the_whole_message():
    assert message(outcome([0, 0, 1, 0, 1])) == (
        "solve_qp: 2 of 5 problems did not converge (first: index 2, residual 2.1e-03, tol 1.0e-10, "
        "50 of 50 iterations). Raise max_iter, rescale the data or start nearer; an infeasible problem never "
        "converges. Or pass on_failure='warn' to get the last iterate, and zero gradient, for the failed problems."
    )


def test_one_problem_without_a_batch_has_no_index():
    text = message(outcome(int(Status.INFEASIBLE), iterations=7), InfeasibleError)
    assert text.startswith("solve_qp: the problem has no feasible point: a combination of its constraints")
    assert "(residual 2.1e-03, tol 1.0e-10, 7 of 50 iterations)" in text
    assert "index" not in text


def test_singular_and_plural():
    assert "1 of 3 problems has no feasible point" in message(outcome([0, 2, 0]), InfeasibleError)
    assert "(index 1, residual" in message(outcome([0, 2, 0]), InfeasibleError)
    assert "2 of 3 problems have no feasible point" in message(outcome([0, 2, 2]), InfeasibleError)
    assert "(first: index 1, residual" in message(outcome([0, 2, 2]), InfeasibleError)


def test_several_batch_dimensions_give_a_full_index():
    assert "1 of 6 problems did not converge (index (1, 2), " in message(outcome([[0, 0, 0], [0, 0, 1]]))
    assert "(first: index (0, 1), " in message(outcome([[0, 1, 0], [0, 0, 1]]))
    assert "(index (0,), " not in message(outcome([1]))


def test_the_first_failed_problem_decides_and_the_others_are_counted():
    text = message(outcome([0, 3, 1, 1, 3]), UnboundedError)
    assert "2 of 5 problems have an objective" in text and "2 more failed in another way." in text
    assert "another way" not in message(outcome([0, 1, 1]))


def test_a_problem_marked_converged_is_never_counted():
    info = outcome([1, 1, 0])._replace(converged=torch.tensor([True, False, True]))
    assert "1 of 3 problems did not converge (index 1, " in message(info)


@pytest.mark.parametrize(("residual", "text"), [(float("nan"), "residual nan"), (float("inf"), "residual inf")])
def test_a_broken_residual_is_shown(residual, text):
    assert text in message(outcome([0, 1], residual=residual))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_residuals_are_shown(dtype):
    info = outcome([0, 1])
    assert "residual 2.1e-03" in message(info._replace(residual=info.residual.to(dtype)))


def test_a_warning_says_what_is_returned_and_points_at_the_users_line():
    with pytest.warns(ConvergenceWarning, match="solve_qp: 1 of 2 problems has no feasible point") as caught:
        report_failure(outcome([0, 2]), "warn", what="solve_qp", tol=1e-8, max_iter=9)
    text = str(caught[0].message)
    assert text.endswith("The last iterate is returned for the failed problems, with zero gradient.")
    assert "on_failure" not in text
    assert caught[0].filename == __file__
    assert "report_failure(outcome" in linecache.getline(__file__, caught[0].lineno)


def test_ignore_is_silent_and_does_not_wait(host_syncs):
    with warnings.catch_warnings(), host_syncs() as syncs:
        warnings.simplefilter("error")
        report(outcome([1, 2, 3]), "ignore")
    assert syncs.count == 0, syncs


def test_success_waits_once(host_syncs):
    info = outcome([0] * 8)
    with host_syncs() as syncs:
        report(info)
    assert syncs.count == 1, syncs


@pytest.mark.parametrize("policy", ["raise", "warn", "ignore"])
def test_the_three_policies_are_accepted(policy):
    check_on_failure(policy)


@pytest.mark.parametrize("policy", ["Raise", "", "error", None, 1, True])
def test_other_policies_are_refused(policy):
    with pytest.raises(ValueError, match="on_failure must be one of"):
        check_on_failure(policy)


def test_a_solution_unpacks():
    info = outcome([0])
    value, same = Solution(torch.ones(1, 2), info)
    assert same is info and value.shape == (1, 2)
