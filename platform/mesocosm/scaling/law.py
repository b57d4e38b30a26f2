"""law.json: a fitted law with its intervals, and what must be known to use it. Imports neither
torch nor Ray.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from mesocosm.errors import UsageError
from mesocosm.scaling.forms import FORMS, LOG_R, NOTHING, Array, Cells

LEVEL = 0.9
Pair = tuple[float, float]
NIL = 1e-12
"""Less is said as 0: E, whose logarithm is fitted, ends at 1e-26 where there is none."""


def span(pair: Pair) -> str:
    """An interval, as it is said to people."""
    low, high = (0.0 if abs(value) < NIL else value for value in pair)
    return f"{low:.3g} to {high:.3g}"


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class Note(_Part):
    """A warning: a stable code, and a sentence with names and values."""

    code: str
    sentence: str


class Optimal(_Part):
    """N_opt = kN C^a and D_opt = kD C^b, of fresh data, for C FLOPs."""

    a: float
    b: float
    kN: float
    kD: float


class Flops(_Part):
    """C = k N^p D^q: 6 N D, or the least squares of the table's `flops` in logarithms."""

    source: Literal["6ND", "table"]
    k: float
    p: float
    q: float
    max_rel_residual: float
    params_most: float | None = None
    """The largest N that was fitted. Beyond it C grows with N at least as 6 N D does: of a small
    network most FLOPs are those of embeddings and outputs, and a power fitted to them would promise
    larger ones for far too little.
    """

    def log_each(self, log_n: Array) -> Array:
        """log of C at D = 1."""
        beyond = (
            0.0
            if self.params_most is None
            else max(0.0, 1 - self.p) * np.maximum(log_n - math.log(self.params_most), 0.0)
        )
        return math.log(self.k) + self.p * log_n + beyond


class Errors(_Part):
    """Relative errors |predicted / measured - 1|."""

    mean_rel_error: float
    max_rel_error: float
    mean_error_of_span: float
    """Mean of |predicted - measured| over what the table's losses span: a discretised likelihood
    has a constant of its own, which flatters relative errors.
    """


class HeldOut(Errors):
    """Of a second fit, which saw no cell above `max_fitted_flops`, on the `n_cells` from
    `min_flops` up; those between are in neither.
    """

    n_cells: int
    n_fitted: int
    min_flops: float
    max_fitted_flops: float
    baselines: dict[str, Errors]
    """`power_law`: the same form with E = 0, fitted on the same cells. `last_size`: the loss of the
    largest fitted size on its most data.
    """
    beats_baselines: bool


class Budget(_Part):
    """The least loss of one budget's parabola in log N, or why there is none."""

    flops: float
    n_sizes: int
    N_opt: float | None
    D_opt: float | None
    refused: str | None


class IsoFlop(_Part):
    """The second approach: parabolas of loss in log N at fixed FLOPs, and the power law through
    their minima.
    """

    source: Literal["budgets", "interpolated"]
    """The table's own budgets, or cells of each size interpolated in log C to common ones."""
    a: float
    b: float
    kN: float
    kD: float
    interval: dict[str, Pair]
    budgets: list[Budget]


class WithoutE(_Part):
    """The fit with E = 0, made where the interval of E touches 0."""

    params: dict[str, float]
    interval: dict[str, Pair]
    optimal: Optimal
    objective: float


class Dropped(_Part):
    """An outlier that was left out on request."""

    line: int
    params: float
    data: float
    loss: float
    predicted: float
    deviations: float


class Bootstrap(_Part):
    """What the intervals are quantiles of; `draws` holds each resample's parameters, which vary
    together.
    """

    resamples: int
    by: Literal["trunk", "cell"]
    groups: int
    seed: int
    draws: dict[str, list[float]]


class Provenance(_Part):
    table: str
    sha256: str
    rows: int
    command: str
    version: str
    swept: dict[str, Any] | None = None
    """Of a sweep's law, the part of its config that says what was trained (`model`, `train`, ...);
    plans train the same.
    """


class Law(_Part):
    """A law of loss, fitted on all kept cells."""

    schema_version: Literal[1] = 1
    form: Literal["chinchilla", "data_constrained"]
    params: dict[str, float]
    """E, A, B, alpha, beta, and r_n, r_d of the data-constrained form."""
    interval: dict[str, Pair]
    """Of each of `params` and `optimal`."""
    interval_level: float = LEVEL
    optimal: Optimal
    flops: Flops
    objective: float
    """Sum over cells of weight x Huber loss (delta 1e-3) of the residual of log loss."""
    n_cells: int
    """Rows that were fitted."""
    residual: float
    """Root mean square of the residuals of log loss."""
    range: dict[str, Pair]
    """Least and largest params, data, flops, loss (and unique) of the fitted cells: beyond them the
    law extrapolates.
    """
    correlation: dict[str, float | None]
    """Of E with the exponents over the resamples; None where one of them does not vary."""
    held_out: HeldOut | None
    isoflop: IsoFlop | None
    without_E: WithoutE | None
    dropped: list[Dropped]
    warnings: list[Note]
    bootstrap: Bootstrap
    provenance: Provenance = Field(description="Where the law came from")

    @model_validator(mode="after")
    def _whole(self) -> Law:
        """All that a law is used for is there."""
        names = set(FORMS[self.form].params)
        for what, there in (
            ("params", set(self.params)),
            ("interval", set(self.interval)),
            ("bootstrap.draws", set(self.bootstrap.draws)),
        ):
            if missing := names - there:
                raise ValueError(f"{what} lacks {', '.join(sorted(missing))} of {self.form}")
        if missing := {"params", "data", "flops"} - set(self.range):
            raise ValueError(f"range lacks {', '.join(sorted(missing))}")
        if (
            len({len(values) for values in self.bootstrap.draws.values()}) != 1
            or not self.bootstrap.draws["E"]
        ):
            raise ValueError("bootstrap.draws are not of one length")
        return self

    def predict(self, params: ArrayLike, data: ArrayLike, unique: ArrayLike | None = None) -> Array:
        """Loss of N `params` trained on D `data`, of which `unique` (None: all) are distinct;
        broadcasts.
        """
        return _predict(self.form, self.params, params, data, unique)[0]

    def predict_interval(
        self, params: ArrayLike, data: ArrayLike, unique: ArrayLike | None = None
    ) -> tuple[Array, Array]:
        """The interval of `predict` at `interval_level`: of the law, without the noise of a single
        run.
        """
        drawn = _predict(self.form, self.bootstrap.draws, params, data, unique)
        low, high = np.quantile(
            drawn, [(1 - self.interval_level) / 2, (1 + self.interval_level) / 2], axis=0
        )
        return low, high

    def optimum(self, flops: ArrayLike) -> tuple[Array, Array]:
        """(N, D) of the least loss for `flops`, on fresh data."""
        budget = np.asarray(flops, dtype=np.float64)
        return self.optimal.kN * budget**self.optimal.a, self.optimal.kD * budget**self.optimal.b

    def write(self, path: str | Path) -> None:
        """Write law.json, one key a line. Raises UsageError where it cannot."""
        lines = (
            f" {json.dumps(key)}: {json.dumps(value)}"
            for key, value in self.model_dump(mode="json").items()
        )
        target = Path(path)
        part = target.with_name(f".{target.name}.{os.getpid()}")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            part.write_text("{\n" + ",\n".join(lines) + "\n}\n")
            part.replace(target)
        except OSError as error:
            with suppress(OSError):
                part.unlink()
            raise UsageError(
                f"the law cannot be written to {str(path)!r}: {error.strerror}; give --out a file"
                " in a folder that may be written"
            ) from error

    @classmethod
    def read(cls, path: str | Path) -> Law:
        """Raises UsageError where there is no law."""
        try:
            return cls.model_validate_json(Path(path).read_text())
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(
                f"the law {str(path)!r} cannot be read ({error}); mesocosm fit TABLE.csv --out"
                f" {path} makes one"
            ) from error
        except ValidationError as error:
            first = error.errors()[0]
            at = ".".join(str(part) for part in first["loc"]) or "the file"
            raise UsageError(
                f"{str(path)!r} is no law: {at}: {first['msg']}; mesocosm fit TABLE.csv --out"
                f" {path} makes one"
            ) from error


def theta_of(form: str, params: Mapping[str, ArrayLike]) -> Array:
    """[m, P] from published parameters, each one or m of them."""
    columns: list[Any] = []
    for name in FORMS[form].params:
        values = np.atleast_1d(np.asarray(params[name], dtype=np.float64))
        if name not in ("alpha", "beta"):
            with np.errstate(divide="ignore"):
                values = np.maximum(np.log(values), NOTHING)
        columns.append(values)
    return np.stack(columns, 1)


def params_of(form: str, theta: Array) -> dict[str, Array]:
    """The inverse of `theta_of`: name -> [m]. A term that is nothing is 0."""
    out = {}
    for i, name in enumerate(FORMS[form].params):
        if name in ("alpha", "beta"):
            out[name] = theta[:, i]
        elif name in ("r_n", "r_d"):
            out[name] = np.exp(np.clip(theta[:, i], *LOG_R))
        else:
            out[name] = np.where(
                theta[:, i] < NOTHING / 10, 0.0, np.exp(np.clip(theta[:, i], NOTHING, -NOTHING))
            )
    return out


def optimal_of(theta: Array, flops: Flops) -> dict[str, Array]:
    """a, b, kN, kD, each [m], of the least E + A/N^alpha + B/D^beta with k N^p D^q = C.

    Of fresh data a size is worth rho = N / N_opt(D) times g of N_opt(D), the size for which D is
    the optimum at 6 N D, where alpha A / N_opt^alpha = beta B / D^beta; g(rho) is rho, or saturates
    above 1 with r_n of the data-constrained form (`forms._Effective`). Then the loss above E is
    proportional to D^-beta (1 + beta/alpha g^-alpha) and C to rho^p D^(p beta/alpha + q), so that
    the best rho is the same for every C: (q/p)^(1/alpha) where nothing saturates, 1 where C = k N
    D. So N_opt and D_opt are powers, a = beta / (p beta + q alpha), b = alpha / (p beta + q alpha);
    with 6 N D they are the closed forms of Hoffmann et al.
    """
    a0, b0, alpha, beta = theta[:, 1], theta[:, 2], theta[:, 3], theta[:, 4]
    with np.errstate(all="ignore"):
        log_rho = math.log(flops.q / flops.p) / alpha
        if theta.shape[1] == 7 and flops.q > flops.p:
            log_rho = _saturating(theta, flops, log_rho)
        log_n = log_rho + (np.log(alpha / beta) + a0 - b0) / alpha  # of the N that goes with D = 1
        a = beta / (flops.p * beta + flops.q * alpha)
        b = alpha / (flops.p * beta + flops.q * alpha)
        log_kd = -b * (math.log(flops.k) + flops.p * log_n)
        log_kn = log_n + beta / alpha * log_kd
        return {
            "a": a,
            "b": b,
            "kN": np.exp(np.clip(log_kn, -700, 700)),
            "kD": np.exp(np.clip(log_kd, -700, 700)),
        }


def _saturating(theta: Array, flops: Flops, most: Array) -> Array:
    """The best log rho [m] of `optimal_of`, between 0 and where it would be if g(rho) were rho, by
    three grids.
    """
    alpha, beta, r = (
        theta[:, 3, None],
        theta[:, 4, None],
        np.exp(np.clip(theta[:, 5, None], *LOG_R)),
    )
    low, high = np.zeros(len(theta)), np.where(np.isfinite(most), most, 0.0)
    rows = np.arange(len(theta))
    for _ in range(4):
        at = np.linspace(low, high, 65, axis=1)
        log_g = np.log1p(r * -np.expm1(-np.expm1(at) / r))
        loss = flops.p * beta * alpha / (flops.p * beta + flops.q * alpha) * at + np.log1p(
            beta / alpha * np.exp(-alpha * log_g)
        )
        best = loss.argmin(1)
        low, high = at[rows, np.maximum(best - 1, 0)], at[rows, np.minimum(best + 1, 64)]
    return at[rows, best]


def _predict(
    form: str,
    params: Mapping[str, ArrayLike],
    size: ArrayLike,
    data: ArrayLike,
    unique: ArrayLike | None,
) -> Array:
    """[m, ...]."""
    n, d, u = np.broadcast_arrays(
        *(np.asarray(x, dtype=np.float64) for x in (size, data, data if unique is None else unique))
    )
    for name, values in (("params", n), ("data", d), ("unique", u)):
        if not (values > 0).all():
            raise UsageError(
                f"{name}={float(np.min(values)):g} must be above 0 for a law to predict a loss"
            )
    cells = Cells(*(np.log(x).reshape(-1) for x in (n, d, u)))
    theta = theta_of(form, params)
    return np.exp(FORMS[form].log_loss(theta, cells)).reshape(len(theta), *n.shape)
