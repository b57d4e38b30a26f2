"""law.json: a fitted law of loss with its intervals and warnings. Imports neither torch nor Ray."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from mesocosm.errors import UsageError
from mesocosm.scaling.forms import FORMS, LOG_R, NOTHING, Array, Cells, loss_unit
from mesocosm.store.files import write_whole

LEVEL = 0.9
"""The level of every interval."""
Pair = tuple[float, float]


def quantiles(values: ArrayLike, level: float = LEVEL) -> Pair:
    """The central interval that holds `level` of the finite values."""
    finite = np.asarray(values, dtype=np.float64)
    finite = finite[np.isfinite(finite)]
    low, high = np.quantile(finite if len(finite) else [0.0], [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def interval_text(pair: Pair) -> str:
    # E is fitted as a logarithm: it ends near 1e-26 where E = 0.
    low, high = (0.0 if abs(value) < 1e-12 else value for value in pair)
    return f"{low:.3g} to {high:.3g}"


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class Note(_Part):
    """A warning. Scripts may compare its code."""

    code: str
    sentence: str


class Optimal(_Part):
    """N_opt = kN C^a and D_opt = kD C^b for C FLOPs on fresh data."""

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
    """The largest fitted N. Beyond it C grows with N at least as fast as 6 N D: most FLOPs of a
    small network are in embeddings and outputs, so that an extrapolated power is too cheap.
    """

    def log_each(self, log_n: Array) -> Array:
        """log C at D = 1."""
        line = math.log(self.k) + self.p * log_n
        if self.params_most is None:
            return line
        return line + max(0.0, 1 - self.p) * np.maximum(log_n - math.log(self.params_most), 0.0)


class LawErrors(_Part):
    """Relative errors |predicted / measured - 1|, and the mean of |predicted - measured| over the
    range of the table's losses, in which the constant of a discretised likelihood cancels.
    """

    mean_rel_error: float
    max_rel_error: float
    mean_error_of_span: float


class HeldOut(LawErrors):
    """Errors of a second fit to cells of at most `max_fitted_flops`, on those from `min_flops` up.

    The baselines are `power_law`, the same form with E = 0, and `last_size`, the loss of the
    largest fitted size on its most data.
    """

    n_cells: int
    n_fitted: int
    min_flops: float
    max_fitted_flops: float
    baselines: dict[str, LawErrors]
    beats_baselines: bool


class Budget(_Part):
    """The minimum of one budget's parabola in log N, or why there is none."""

    flops: float
    n_sizes: int
    N_opt: float | None = None
    D_opt: float | None = None
    refused: str | None = None


class IsoFlop(Optimal):
    """The second approach: a power law through the minima of parabolas at fixed FLOPs.

    The source is the table's budgets, or each size's losses interpolated in log C.
    """

    source: Literal["budgets", "interpolated"]
    interval: dict[str, Pair]
    budgets: list[Budget]


class WithoutE(_Part):
    """The fit with E = 0, made where the interval of E touches 0."""

    params: dict[str, float]
    interval: dict[str, Pair]
    optimal: Optimal
    objective: float


class Dropped(_Part):
    """An outlier that the fit left out on request, robust standard deviations from the law."""

    line: int
    params: float
    data: float
    loss: float
    predicted: float
    deviations: float


class Bootstrap(_Part):
    """The resamples behind the intervals. `draws` holds each parameter's value in each of them."""

    resamples: int
    by: Literal["trunk", "cell"]
    groups: int
    seed: int
    draws: dict[str, list[float]]


class Provenance(_Part):
    """The table and the command. `swept` is the sweep's config: plans train the same models.
    `tokenizer` is the id of the one whose codes the losses measure, and is absent without images.
    """

    table: str
    sha256: str
    rows: int
    command: str
    version: str
    swept: dict[str, Any] | None = None
    tokenizer: str | None = Field(default=None, exclude_if=lambda value: value is None)


class Law(_Part):
    """A law of loss, fitted on all cells that were not dropped. docs/scaling.md lists its keys."""

    schema_version: Literal[1] = 1
    form: Literal["chinchilla", "data_constrained"]
    params: dict[str, float]
    interval: dict[str, Pair]
    interval_level: float = LEVEL
    optimal: Optimal
    flops: Flops
    objective: float
    n_cells: int
    residual: float
    range: dict[str, Pair]
    correlation: dict[str, float | None]
    held_out: HeldOut | None
    isoflop: IsoFlop | None
    without_E: WithoutE | None
    dropped: list[Dropped]
    warnings: list[Note]
    bootstrap: Bootstrap
    provenance: Provenance

    @model_validator(mode="after")
    def _complete(self) -> Law:
        names, draws = set(FORMS[self.form].params), self.bootstrap.draws
        for key, expected, values in (
            ("params", names, self.params),
            ("interval", names, self.interval),
            ("bootstrap.draws", names, draws),
            ("range", {"params", "data", "flops"}, self.range),
        ):
            if missing := expected - set(values):
                raise ValueError(f"{key} lacks {', '.join(sorted(missing))}")
        if len({len(values) for values in draws.values()}) != 1 or not draws["E"]:
            raise ValueError("bootstrap.draws must have one length above 0")
        return self

    @property
    def unit(self) -> str:
        """The unit of its loss."""
        family = (self.provenance.swept or {}).get("model", {}).get("family")
        return loss_unit(family, self.provenance.tokenizer)

    def predict(self, params: ArrayLike, data: ArrayLike, unique: ArrayLike | None = None) -> Array:
        """Predict the loss.

        Args:
            params: N, parameters. The arguments broadcast.
            data: D, transitions seen.
            unique: U, different transitions among them. Defaults to all.
        """
        return self._losses(self.params, params, data, unique)[0]

    def predict_interval(
        self, params: ArrayLike, data: ArrayLike, unique: ArrayLike | None = None
    ) -> tuple[Array, Array]:
        """The interval of `predict` at `interval_level`, without the noise of a single run."""
        losses = self._losses(self.bootstrap.draws, params, data, unique)
        level = self.interval_level
        low, high = np.quantile(losses, [(1 - level) / 2, (1 + level) / 2], axis=0)
        return low, high

    def _losses(
        self,
        values: Mapping[str, ArrayLike],
        params: ArrayLike,
        data: ArrayLike,
        unique: ArrayLike | None,
    ) -> Array:
        """[m, ...] for m values of each parameter of the law."""
        named = {"params": params, "data": data, "unique": data if unique is None else unique}
        arrays = np.broadcast_arrays(*(np.asarray(x, dtype=np.float64) for x in named.values()))
        for name, array in zip(named, arrays, strict=True):
            if not (array > 0).all():
                raise UsageError(f"{name} must be above 0, got {float(np.min(array)):g}")
        cells, theta = Cells(*(np.log(x).reshape(-1) for x in arrays)), theta_of(self.form, values)
        log_loss = FORMS[self.form].log_loss(theta, cells)
        return np.exp(log_loss).reshape(len(theta), *arrays[0].shape)

    def optimum(self, flops: ArrayLike) -> tuple[Array, Array]:
        """(N, D) of the least loss for `flops`, on fresh data."""
        budget, best = np.asarray(flops, dtype=np.float64), self.optimal
        return best.kN * budget**best.a, best.kD * budget**best.b

    def write(self, path: str | Path) -> None:
        """Write law.json, one key a line, in one rename.

        Raises:
            UsageError: the file cannot be written.
        """
        values = self.model_dump(mode="json")
        lines = (f" {json.dumps(key)}: {json.dumps(value)}" for key, value in values.items())
        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            write_whole(Path(path).absolute(), ("{\n" + ",\n".join(lines) + "\n}\n").encode())
        except OSError as error:
            message = f"the law cannot be written to {str(path)!r}: {error.strerror}"
            raise UsageError(f"{message}; give --out a file in a writable folder") from error

    @classmethod
    def read(cls, path: str | Path) -> Law:
        """Read law.json.

        Raises:
            UsageError: the file cannot be read or does not hold a law.
        """
        fix = f"mesocosm fit TABLE.csv --out {path} makes one"
        try:
            return cls.model_validate_json(Path(path).read_text())
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"the law {str(path)!r} cannot be read ({error}); {fix}") from error
        except ValidationError as error:
            first = error.errors()[0]
            at = ".".join(str(part) for part in first["loc"]) or "the file"
            raise UsageError(f"{str(path)!r} is not a law: {at}: {first['msg']}; {fix}") from error


def theta_of(form: str, params: Mapping[str, ArrayLike]) -> Array:
    """[m, P] from parameters by name, each a number or m of them."""
    columns: list[Array] = []
    for name in FORMS[form].params:
        values = np.atleast_1d(np.asarray(params[name], dtype=np.float64))
        if name not in ("alpha", "beta"):
            with np.errstate(divide="ignore"):
                values = np.maximum(np.log(values), NOTHING)
        columns.append(values)
    return np.stack(columns, 1)


def params_of(form: str, theta: Array) -> dict[str, Array]:
    """The inverse of `theta_of`: name -> [m]. The logarithm NOTHING becomes 0."""
    out = dict(zip(FORMS[form].params, theta.T, strict=True))
    for name in ("E", "A", "B"):
        level = np.exp(np.clip(out[name], NOTHING, -NOTHING))
        out[name] = np.where(out[name] < NOTHING / 10, 0.0, level)
    return out | {name: np.exp(np.clip(out[name], *LOG_R)) for name in out.keys() & {"r_n", "r_d"}}


def optimal_of(theta: Array, flops: Flops) -> dict[str, Array]:
    """a, b, kN, kD, each [m], of the least E + A/N^alpha + B/D^beta with k N^p D^q = C.

    On fresh data N counts as g(rho) N_opt(D), where rho = N / N_opt(D) and N_opt(D) is the size for
    which D is the optimum at 6 N D: alpha A / N_opt^alpha = beta B / D^beta. g(rho) is rho, or
    saturates above 1 with r_n of the data-constrained form (`forms._effective`). Then the loss
    above E is proportional to D^-beta (1 + beta/alpha g^-alpha) and C to rho^p D^(p beta/alpha +
    q), so that the best rho is the same for every C: (q/p)^(1/alpha) where nothing saturates, 1
    where C = k N D. So N_opt and D_opt are powers, a = beta / (p beta + q alpha), b = alpha / (p
    beta + q alpha). With 6 N D they are the closed forms of Hoffmann et al.
    """
    a0, b0, alpha, beta = theta[:, 1], theta[:, 2], theta[:, 3], theta[:, 4]
    with np.errstate(all="ignore"):
        log_rho = math.log(flops.q / flops.p) / alpha
        if theta.shape[1] == 7 and flops.q > flops.p:
            log_rho = _saturating(theta, flops, log_rho)
        log_n = log_rho + (np.log(alpha / beta) + a0 - b0) / alpha  # log N at D = 1
        a = beta / (flops.p * beta + flops.q * alpha)
        b = alpha / (flops.p * beta + flops.q * alpha)
        log_kd = -b * (math.log(flops.k) + flops.p * log_n)
        levels = {"kN": log_n + beta / alpha * log_kd, "kD": log_kd}
        return {"a": a, "b": b} | {k: np.exp(np.clip(v, -700, 700)) for k, v in levels.items()}


def _saturating(theta: Array, flops: Flops, most: Array) -> Array:
    """The best log rho [m] of `optimal_of`, by nested grids from 0 to the unsaturated `most`."""
    alpha, beta = theta[:, 3, None], theta[:, 4, None]
    r = np.exp(np.clip(theta[:, 5, None], *LOG_R))
    low, high = np.zeros(len(theta)), np.where(np.isfinite(most), most, 0.0)
    rows = np.arange(len(theta))
    cost = flops.p * beta * alpha / (flops.p * beta + flops.q * alpha)
    for _ in range(4):
        at = np.linspace(low, high, 65, axis=1)
        log_g = np.log1p(r * -np.expm1(-np.expm1(at) / r))
        loss = cost * at + np.log1p(beta / alpha * np.exp(-alpha * log_g))
        best = loss.argmin(1)
        low, high = at[rows, np.maximum(best - 1, 0)], at[rows, np.minimum(best + 1, 64)]
    return at[rows, best]
