"""Compiled programs are kept in the user's cache directory, and found there by another process."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from trainfn.engine.cache import kept_programs, user_directory

VARIABLE = "TORCHINDUCTOR_CACHE_DIR"

PROGRAM = """
import torch, trainfn
from torch._dynamo.utils import counters
torch.set_num_threads(1)
model, optimizer = torch.nn.Linear(3, 3), trainfn.optim.sgd(0.1)
step = trainfn.compile(trainfn.make_step(model, loss="mse", optimizer=optimizer), mode="graph")
step(trainfn.init(model, optimizer), (torch.ones(2, 3), torch.zeros(2, 3)))
print(*(counters["inductor"][name] for name in ("fxgraph_cache_hit", "fxgraph_cache_miss")))
"""


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(VARIABLE, raising=False)


def inside() -> str | None:
    with kept_programs():
        return os.environ.get(VARIABLE)


def test_it_is_the_users_own_and_set_only_while_compiling(tmp_path: Path) -> None:
    found = inside()
    assert found is not None
    assert Path(found).is_relative_to(tmp_path / "cache" / "trainfn")
    assert Path(found).stat().st_mode & 0o077 == 0
    assert os.environ.get(VARIABLE) in (None, default_cache_dir())


def test_the_users_choice_is_respected_and_torchs_own_is_not_taken_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "/somewhere/else")
    assert inside() == "/somewhere/else"
    monkeypatch.setenv(VARIABLE, default_cache_dir())
    assert Path(str(inside())).parent == Path(str(user_directory()))
    assert os.environ[VARIABLE] == default_cache_dir()


def test_where_nothing_can_be_written_it_is_torchs_after_all(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for base in (str(tmp_path / "file"), "not/absolute"):  # a read-only home fails likewise, but not for root
        monkeypatch.setenv("XDG_CACHE_HOME", base)
        assert user_directory() is None
        assert inside() is None


def test_an_error_inside_puts_it_back() -> None:
    with pytest.raises(KeyError), kept_programs():
        raise KeyError
    assert os.environ.get(VARIABLE) in (None, default_cache_dir())


def test_programs_with_other_vector_instructions_are_kept_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Control: without a reason to, they are not."""
    usual = inside()
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "default")
    assert inside() != usual
    monkeypatch.delenv("ATEN_CPU_CAPABILITY")
    assert inside() == usual


TRIALS = """
import torch, torch._inductor.compile_fx
from torch._inductor.cpu_vec_isa import VecISA
trials = []
VecISA.check_build = lambda isa, code: trials.append(str(isa)) or WORKS
from trainfn.engine.cache import kept_programs
with kept_programs():
    from torch._inductor.cpu_vec_isa import pick_vec_isa
    print(len(trials))
    print(pick_vec_isa())
"""


@pytest.mark.skipif(platform.machine() != "x86_64", reason="elsewhere there is one set of vector instructions")
def test_vector_instructions_that_have_worked_are_not_tried_again() -> None:
    def run(works: str) -> tuple[int, str]:
        program = TRIALS.replace("WORKS", works)
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        trials, chosen = done.stdout.splitlines()
        return int(trials), chosen

    none = run("False")
    assert none[0] > 0
    assert run("False") == none  # that they do not work, a busy machine may have said
    first, again = run("True"), run("True")
    assert first[1] == again[1] != none[1]
    assert first[0] > again[0]


@pytest.mark.slow
def test_programs_of_a_process_without_them_are_not_those_of_one_with_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch (2.13) takes the kept source, and does not build it."""
    for capability in ("", "default", ""):
        monkeypatch.setenv("ATEN_CPU_CAPABILITY", capability)
        subprocess.run([sys.executable, "-c", PROGRAM.replace("3", "64")], capture_output=True, check=True)


@pytest.mark.slow
def test_another_process_finds_what_one_has_compiled() -> None:
    """The control is the first process: it finds nothing in an empty directory, whatever is in PyTorch's own."""

    def hits_and_misses() -> list[int]:
        done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
        return [int(word) for word in done.stdout.split()]

    hits, misses = hits_and_misses()
    assert hits == 0 < misses
    hits, misses = hits_and_misses()
    assert misses == 0 < hits
