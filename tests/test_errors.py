"""One family of exceptions: each says what, where, expected, got and what to try, and survives a process border."""

from __future__ import annotations

import copy
import pickle
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest

from trainfn import errors
from trainfn.errors import ConfigError, TrainfnError, suggest

FAMILY = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, TrainfnError)]
FIELDS = {"where": "batch 3", "expected": ("a", 1), "got": -3, "hint": "pass max_steps=1000"}


@pytest.mark.parametrize(
    ("name", "builtin"),
    [
        ("ConfigError", ValueError),
        ("DataError", ValueError),
        ("ModelError", ValueError),
        ("CompileError", RuntimeError),
        ("DonatedStateError", RuntimeError),
        ("CheckpointError", RuntimeError),
        ("DivergenceError", ArithmeticError),
        ("MissingPackageError", ImportError),
    ],
)
def test_each_is_also_the_builtin_a_python_programmer_would_catch(name: str, builtin: type[Exception]) -> None:
    assert issubclass(getattr(errors, name), builtin)


@pytest.mark.parametrize("cls", FAMILY)
def test_the_message_has_a_line_for_each_field_that_was_given(cls: type[TrainfnError]) -> None:
    assert str(cls("It broke.")) == "It broke."
    lines = str(cls("It broke.", **FIELDS)).splitlines()
    assert lines == [
        "It broke.",
        "  where: batch 3",
        "  expected: ('a', 1)",
        "  got: -3",
        "  try: pass max_steps=1000",
    ]


@pytest.mark.parametrize("falsy", [0, "", (), False])
def test_a_falsy_value_is_shown_too(falsy: object) -> None:
    assert str(ConfigError("It broke.", got=falsy)) == f"It broke.\n  got: {falsy}"


@pytest.mark.parametrize("cls", FAMILY)
@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_pickle_brings_back_every_field(cls: type[TrainfnError], protocol: int) -> None:
    error = cls("It broke.", **FIELDS)
    for found in (pickle.loads(pickle.dumps(error, protocol)), copy.copy(error), copy.deepcopy(error)):
        assert type(found) is cls
        assert str(found) == str(error)
        assert (found.what, found.where, found.expected, found.got, found.hint) == ("It broke.", *FIELDS.values())


def fail() -> None:
    raise ConfigError("It broke.", **FIELDS)


def test_an_error_in_a_worker_process_arrives_whole() -> None:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool, pytest.raises(ConfigError) as caught:
        pool.submit(fail).result()
    assert caught.value.expected == ("a", 1)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("langauge", "did you mean 'language'?"),
        ("Language", "did you mean 'language'?"),
        ("zzz", "one of adam, language, sgd"),
        ("", "one of adam, language, sgd"),
    ],
)
def test_suggest_gives_the_nearest_name_or_all(name: str, hint: str) -> None:
    assert suggest(name, iter(["sgd", "language", "adam"])) == hint
