"""`solve_plan`: the choice of a candidate for each layer whose error is least within a budget of bits.

    minimise  sum over l, c of error[l, c] z[l, c]
    such that sum over c of z[l, c] = 1,   sum over l, c of bits[l, c] z[l, c] <= budget * weights,   z in {0, 1}

over layers l and candidates c, an integer program for SciPy's HiGHS. Source: LQ-LoRA (Guo et al., ICLR 2024).
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Iterable

import numpy

from loftq_kernels.models.plan import BitPlan, counted_bits

_NEEDS_SCIPY = "plans are solved by SciPy: pip install 'loftq_kernels[plan]'"
# Relative to the total error; HiGHS' default. At 1e-6 it took three times as long, and wrote to standard output.
_MIP_GAP = 1e-4
_AT_LIMIT = 1  # SciPy's status when a limit ended the search.
_SECONDS = 60.0  # Then the best plan so far is taken. 700 layers under nine candidates took 1.5 s.


class UnsolvedError(RuntimeError):
    """The solver of integer programs gave no plan."""


def solve_plan(plan: BitPlan, budget: float | None = None) -> BitPlan:
    """The plan with the best choice of each layer for a budget (default: its own), from the errors that it holds.

    Nothing is measured again. Raises and warns as `plan_bits`, and raises ValueError for a plan without layers, or a
    layer without measured errors.
    """
    milp()
    from scipy.sparse import csr_array

    plan = plan if budget is None else dataclasses.replace(plan, budget=budget)
    if not plan.layers:
        raise ValueError("the plan has no layers to choose for")
    options = []  # (layer's number, name, candidate, bits, error)
    for number, (name, layer) in enumerate(plan.layers.items()):
        measured = [c for c in plan.candidates if c in layer.errors]
        if not measured:
            raise ValueError(f"layer {name!r} has no measured error under any candidate")
        options += [
            (number, name, c, counted_bits(plan.candidates[c], layer, plan.count), layer.errors[c]) for c in measured
        ]
    check_feasible(plan, ((option[1], option[3]) for option in options))
    rows = numpy.array([option[0] for option in options])
    bits = numpy.array([option[3] for option in options], dtype=numpy.float64)
    errors = numpy.array([option[4] for option in options], dtype=numpy.float64)
    weights = sum(layer.weights for layer in plan.layers.values())
    one_each = csr_array((numpy.ones(len(options)), (rows, numpy.arange(len(options)))))
    chosen = _run_milp(errors, one_each, bits * (len(plan.layers) / weights), plan.budget * len(plan.layers))
    choices = {options[i][1]: options[i][2] for i in chosen}
    layers = {name: dataclasses.replace(layer, choice=choices[name]) for name, layer in plan.layers.items()}
    return dataclasses.replace(plan, layers=layers)


def milp():
    """SciPy's solver. Raises ImportError, with the remedy, without it."""
    try:
        from scipy.optimize import milp as solver
    except ImportError as error:
        raise ImportError(_NEEDS_SCIPY) from error
    return solver


def check_feasible(plan: BitPlan, options: Iterable[tuple[str, int]]) -> None:
    """Raise ValueError where the cheapest of the options (layer, bits) exceed the budget."""
    cheapest: dict[str, int] = {}
    for name, bits in options:
        cheapest[name] = min(bits, cheapest.get(name, bits))
    least = sum(cheapest.values()) / sum(layer.weights for layer in plan.layers.values())
    if least > plan.budget * (1 + 1e-9):
        raise ValueError(
            f"budget={plan.budget:g} bits per weight is below {least:.4f}, the least that the candidates "
            f"{', '.join(plan.candidates)} take (count={plan.count!r})"
        )


def _run_milp(errors, one_each, bits, budget: float):
    """Indices of the options chosen. ``bits`` are scaled so that a layer's are near its bits per weight, because
    HiGHS' tolerances are absolute."""
    from scipy.optimize import Bounds, LinearConstraint

    largest = errors.max()
    result = milp()(
        errors / largest if largest > 0 else errors,
        integrality=1 + 0 * errors,
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(bits[None, :], -math.inf, budget)],
        options={"mip_rel_gap": _MIP_GAP, "time_limit": _SECONDS},
    )
    if result.x is None:
        raise UnsolvedError(f"the integer program was not solved: {result.message}")
    if result.status == _AT_LIMIT:
        warnings.warn(
            f"the plan may not be optimal: the solver's {_SECONDS:g} seconds were over (gap {result.mip_gap:.2%})",
            stacklevel=3,
        )
    return (result.x > 0.5).nonzero()[0]
