"""Several sets to evaluate on, by name: ``val_data={"clean": (x, y), "noisy": (x2, y)}``.

A dict of tensors is one data set with fields. So the rule is: a dict is several sets if every one of its values is a
data set by itself, that is a tuple, a dict, a ``DataLoader``, a frame, a stream, anything with ``__len__`` and
``__getitem__`` that is neither a tensor nor an array, or a list of such examples as ``{"text": ...}`` or ``(x, y)``. A
tensor, an array or a list of numbers is a field; as a set of its own, it is written ``(x,)``. A dict with the keys that
the training data has is one data set, whatever its values are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader

from trainfn.data import is_stream
from trainfn.data.forms import is_array, is_frame
from trainfn.errors import DataError


def named_sets(val_data: object, data: object) -> dict[str, Any]:
    """Return the sets, by what the names of their columns begin with; none if there is no data.

    Args:
        val_data: what is evaluated on.
        data: what is trained on.

    Raises:
        DataError: a name that is none, or None in place of a set.

    >>> import torch
    >>> x = torch.ones(2)
    >>> list(named_sets({"clean": (x, x), "noisy": {"x": x}}, (x, x)))
    ['val_clean', 'val_noisy']
    >>> list(named_sets({"x": x, "y": x}, {"x": x, "y": x})), named_sets(None, x)
    (['val'], {})
    """
    if val_data is None:
        return {}
    if not isinstance(val_data, Mapping) or (isinstance(data, Mapping) and val_data.keys() == data.keys()):
        return {"val": val_data}
    are_sets = [_is_set(each) for each in val_data.values()]
    missing = [name for name, each in val_data.items() if each is None]
    if missing and any(are_sets):
        raise DataError(
            "There is nothing in a set to evaluate on.",
            where=f"val_data[{missing[0]!r}]",
            expected="data in any of the forms that fit takes",
            got="None",
            hint="leave the name out",
        )
    if not are_sets or not all(are_sets):
        return {"val": val_data}
    wrong = [name for name in val_data if not (isinstance(name, str) and name.replace("-", "_").isidentifier())]
    if wrong:
        raise DataError(
            "A set to evaluate on needs a name that columns of the history can have.",
            where="val_data",
            expected="letters, digits, - and _",
            got=", ".join(map(repr, wrong)),
        )
    return {f"val_{name}": each for name, each in val_data.items()}


def _is_set(value: object) -> bool:
    if isinstance(value, (tuple, Mapping, DataLoader)) or is_frame(value) or is_stream(value):
        return True
    if isinstance(value, list):
        return bool(value) and isinstance(value[0], (tuple, Mapping))
    if isinstance(value, (Tensor, str, bytes)) or is_array(value):
        return False
    return hasattr(type(value), "__len__") and hasattr(type(value), "__getitem__")
