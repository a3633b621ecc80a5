"""``summary``: the parameters of a model as a plain table: shapes, sizes, what is trained, and gradient norms."""

from __future__ import annotations

from torch import Tensor, nn

from trainfn.errors import ConfigError
from trainfn.plan import Plan
from trainfn.result import FitResult


def summary(of: nn.Module | Plan | FitResult, *, depth: int | None = None) -> str:
    """Return a table of parameters: name, shape, dtype, how many, trained or frozen, and the norm of the gradient.

    Args:
        of: a model; a :class:`trainfn.Plan`, which knows what its optimizer freezes; or the result of a run, whose
            history has the norms (``health_every``): the last ones are shown.
        depth: None for a line for each tensor; else a line for each module that is so many names deep, which adds up
            what is in it (of norms, the root of the sum of squares).

    Raises:
        ConfigError: something else, or a depth below 1.

    >>> print(summary(nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1)), depth=1))
    name  tensors  dtype    parameters  trained
    0     2        float32           9  9
    1     2        float32           4  4
    13 parameters in 4 tensors, 13 trained, 0 frozen
    """
    params, norms = _contents(of)
    if depth is not None and (not isinstance(depth, int) or depth < 1):
        raise ConfigError("A depth counts names.", expected="an int >= 1, or None", got=f"{depth=}")
    lines = [
        (name, param, param.numel() if param.requires_grad else 0, norms.get(name)) for name, param in params.items()
    ]
    table = _by_tensor(lines) if depth is None else _by_module(lines, depth)
    if not norms:
        table = [row[:-1] for row in table]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    text = [
        "  ".join(cell.rjust(width) if number == 3 else cell.ljust(width) for number, (cell, width) in enumerate(pairs))
        for pairs in (list(zip(row, widths, strict=True)) for row in table)
    ]
    total, trained = sum(param.numel() for param in params.values()), sum(line[2] for line in lines)
    text.append(f"{total:,} parameters in {len(params)} tensors, {trained:,} trained, {total - trained:,} frozen")
    return "\n".join(line.rstrip() for line in text)


_Lines = list[tuple[str, Tensor, int, float | None]]


def _contents(of: object) -> tuple[dict[str, Tensor], dict[str, float]]:
    if isinstance(of, FitResult):
        rows = [row["grad_norms"] for row in of.history if "grad_norms" in row]
        return of.state.params, rows[-1] if rows else {}
    if isinstance(of, Plan):
        return of.state.params, {}
    if isinstance(of, nn.Module):
        return dict(of.named_parameters()), {}
    raise ConfigError(
        "There is no summary of this.", expected="a model, a plan, or the result of a run", got=type(of).__name__
    )


def _by_tensor(lines: _Lines) -> list[list[str]]:
    rows = [["name", "shape", "dtype", "parameters", "trained", "gradient norm"]]
    for name, param, trained, norm in lines:
        shape = " x ".join(map(str, param.shape)) or "one number"
        rows.append([name, shape, _dtype(param), f"{param.numel():,}", "yes" if trained else "frozen", _norm(norm)])
    return rows


def _by_module(lines: _Lines, depth: int) -> list[list[str]]:
    groups: dict[str, _Lines] = {}
    for line in lines:
        module = line[0].split(".")[:-1][:depth]
        groups.setdefault(".".join(module) or line[0], []).append(line)
    rows = [["name", "tensors", "dtype", "parameters", "trained", "gradient norm"]]
    for name, group in groups.items():
        dtypes = ", ".join(sorted({_dtype(param) for _, param, _, _ in group}))
        size, trained = sum(param.numel() for _, param, _, _ in group), sum(line[2] for line in group)
        norms = [norm for *_, norm in group if norm is not None]
        whole = sum(norm**2 for norm in norms) ** 0.5 if norms else None
        rows.append([name, str(len(group)), dtypes, f"{size:,}", f"{trained:,}", _norm(whole)])
    return rows


def _dtype(param: Tensor) -> str:
    return str(param.dtype).removeprefix("torch.")


def _norm(norm: float | None) -> str:
    return "" if norm is None else f"{norm:.4g}"
