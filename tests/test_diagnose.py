"""What a diagnosis names: the planted thing and nothing else, over random nets; and what it must not be fooled by."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import attrs
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import trainfn
from tests.strategies import Batch, MlpRecipe, Poisoned, Setup
from trainfn.diagnose import Diagnosis, diagnose
from trainfn.diagnose.diagnosis import Part
from trainfn.health import Verdict
from trainfn.loss import LossSum
from trainfn.optim import adamw, sgd
from trainfn.state import TrainState
from trainfn.step import Step, make_step
from trainfn.store.strict_json import canonical, loads
from trainfn.tree import digest

not_finite = st.sampled_from([math.nan, math.inf, -math.inf])


class Backfired(torch.autograd.Function):
    """The identity; ``value`` is put into one element of the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: float) -> Tensor:
        ctx.value = value
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.index_fill(-1, torch.tensor([0]), ctx.value), None


class Backfire(nn.Module):
    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def forward(self, x: Tensor) -> Tensor:
        return Backfired.apply(x, self.value)


class Planted(nn.Module):
    """Puts ``value`` into one element of what the module inside it returns."""

    def __init__(self, inner: nn.Module, value: float) -> None:
        super().__init__()
        self.inner, self.value = inner, value

    def forward(self, x: Tensor) -> Tensor:
        out = self.inner(x)
        return torch.where(torch.arange(out.numel()).reshape(out.shape) == 1, self.value, out)


class Scale(nn.Module):
    """Multiplies by its weight, whose gradient ``value``, if it is not 0, is added to."""

    def __init__(self, width: int, value: float) -> None:
        super().__init__()
        self.weight, self.value = nn.Parameter(torch.ones(width)), value

    def forward(self, x: Tensor) -> Tensor:
        return x * (Poisoned.apply(self.weight, torch.tensor([self.value])) if self.value else self.weight)


class Residual(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


class Net(nn.Module):
    """Layers that are registered in another order than they run in, so that names in order tell nothing."""

    def __init__(self, recipe: NetRecipe) -> None:
        super().__init__()
        plain = [_layer(kind, recipe) for kind in recipe.layers]
        place = recipe.at % len(plain)
        if recipe.plant == "module":
            plain[place] = _nested(Planted(plain[place], recipe.value), recipe.depth)
        elif recipe.plant in ("gradient", "backward"):
            made = Scale(recipe.width, recipe.value) if recipe.plant == "gradient" else Backfire(recipe.value)
            plain[place] = nn.Sequential(plain[place], _nested(made, recipe.depth))
        if recipe.tied:
            dense = [m for layer in plain for m in layer.modules() if isinstance(m, nn.Linear)]
            for other in dense[1:]:
                other.weight = dense[0].weight
        self.order = torch.randperm(len(plain), generator=torch.Generator().manual_seed(recipe.seed)).tolist()
        self.layers = nn.ModuleList([plain[self.order.index(i)] for i in range(len(plain))])
        self.head = nn.Linear(recipe.width, 3)
        self.start = nn.Linear(recipe.features, recipe.width)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.start(x)
        for index in self.order:
            hidden = self.layers[index](hidden)
        return self.head(hidden)

    def sequence(self) -> list[str]:
        """Return the names of all modules in the order in which they run, each after those inside it."""
        names = ["start"]
        for index in self.order:
            inside = [name for name, _ in self.layers[index].named_modules(prefix=f"layers.{index}")]
            names += sorted(inside, key=lambda name: [(0, part) for part in name.split(".")] + [(1, "")])
        return [*names, "head", ""]


def _nested(module: nn.Module, depth: int) -> nn.Module:
    for _ in range(depth):
        module = nn.Sequential(module)
    return module


def _layer(kind: str, recipe: NetRecipe) -> nn.Module:
    width = recipe.width
    return {
        "linear": lambda: nn.Linear(width, width),
        "layer_norm": lambda: nn.Sequential(nn.Linear(width, width), nn.LayerNorm(width)),
        "batch_norm": lambda: nn.Sequential(nn.Linear(width, width, bias=False), nn.BatchNorm1d(width)),
        "tanh": nn.Tanh,
        "residual": lambda: Residual(nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Dropout(0.2))),
    }[kind]()


@attrs.frozen
class NetRecipe:
    plant: str
    value: float
    at: int
    depth: int
    layers: tuple[str, ...]
    features: int
    width: int
    tied: bool
    frozen: tuple[str, ...]
    accumulate: int
    row: int
    seed: int

    def build(self) -> tuple[Net, Step, TrainState, Batch]:
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            net = Net(self)
        for name, param in net.named_parameters():
            param.requires_grad_(not (self.frozen and name.startswith(self.frozen)))
        own = torch.Generator().manual_seed(self.seed)
        length = 4 * self.accumulate
        batch = {
            "x": torch.randn(length, self.features, generator=own),
            "y": torch.randint(0, 3, (length,), generator=own),
            "extra": torch.zeros(length),
        }
        optimizer = adamw(0.1)
        step = make_step(net, loss=self.loss, optimizer=optimizer, accumulate=self.accumulate)
        state = trainfn.init(net, optimizer, seed=self.seed)
        if self.plant == "batch":
            batch["x"][self.row % length, -1] = self.value
        elif self.plant == "extra":
            batch["extra"][self.row % length] = self.value
        elif self.plant == "state":
            name = sorted(state.params)[self.at % len(state.params)]
            param = state.params[name].detach().clone()
            param.view(-1)[-1] = self.value
            spoilt = param.requires_grad_(state.params[name].requires_grad)
            state = attrs.evolve(state, params=state.params | {name: spoilt}, cursor=self.seed)
        return net, step, state, batch

    def loss(self, outputs: Tensor, batch: Batch) -> LossSum:
        each = F.cross_entropy(outputs, batch["y"], reduction="none") + batch["extra"]
        total = each.sum() * (self.value if self.plant == "loss" else 1.0)
        return LossSum(total=total, weight=torch.tensor(float(len(each))))


def nets(*plants: str) -> st.SearchStrategy[NetRecipe]:
    return st.builds(
        NetRecipe,
        plant=st.sampled_from(plants),
        value=not_finite,
        at=st.integers(0, 9),
        depth=st.integers(0, 2),
        layers=st.lists(
            st.sampled_from(["linear", "layer_norm", "batch_norm", "tanh", "residual"]), min_size=1, max_size=4
        ).map(tuple),
        features=st.integers(1, 3),
        width=st.integers(3, 5),
        tied=st.booleans(),
        frozen=st.sampled_from([(), ("start",), ("layers.0", "head")]),
        accumulate=st.integers(1, 3),
        row=st.integers(0, 11),
        seed=st.integers(0, 999),
    )


def surroundings_of(net: nn.Module, state: TrainState, batch: Batch) -> list[object]:
    """What a diagnosis must leave as it was."""
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks), m.training) for m in net.modules()]
    grads = [param.grad for param in [*net.parameters(), *state.params.values()]]
    marks = [param.requires_grad for param in state.params.values()]
    return [
        digest(state),
        digest(batch),
        digest(dict(net.state_dict())),
        digest(torch.get_rng_state()),
        hooks,
        grads,
        marks,
    ]


Diagnoser = Callable[[Step, TrainState, Batch], Diagnosis]


def check_names(recipe: NetRecipe, diagnoser: Diagnoser = diagnose) -> Diagnosis:
    """Return the diagnosis of a planted fault, which must name it: the answers are known from the planting alone."""
    net, step, state, batch = recipe.build()
    before = surroundings_of(net, state, batch)
    found = diagnoser(step, state, batch)
    assert surroundings_of(net, state, batch) == before, "something was changed"
    assert loads(canonical(found.to_json()))["cause"] == found.cause
    after = step(state, batch)
    verdict = Verdict(int(after.report.verdict))
    if verdict is not Verdict.OK:
        kept = [
            digest(getattr(after, name)) == digest(getattr(state, name))
            for name in ("step", "params", "buffers", "opt")
        ]
        assert all(kept), "the step was refused and changed something"
    assert (verdict is Verdict.OK) == (found.cause == "none"), (verdict, found)
    if verdict is Verdict.OK:  # a tanh or a frozen layer may have swallowed it
        assert found.micro_batch is None
        return found
    # A micro-batch after the one that is told of may spoil the loss as well.
    assert math.isfinite(found.loss) or verdict is Verdict.NON_FINITE_LOSS
    assert not math.isfinite(found.loss) or recipe.accumulate > 1 or verdict is Verdict.NON_FINITE_GRADIENT
    by_row = recipe.plant in ("batch", "extra")
    length = len(batch["y"])
    row = recipe.row % length
    micro_batch = row // 4 + 1 if by_row else 1
    if recipe.plant == "state" and recipe.accumulate > 1:  # -inf as a class's bias spoils where that class occurs
        assert found.micro_batch is not None
        micro_batch = found.micro_batch
    assert (found.micro_batch, found.micro_batches) == (micro_batch, recipe.accumulate)
    expected = {"extra": "batch", "state": "parameter", "backward": "gradient"}.get(recipe.plant, recipe.plant)
    assert found.cause == expected, found
    blamed = [(one.name, one.rows) for one in found.spoilt if one.to_blame]
    assert blamed == {
        "batch": [("batch.x", (row,))],
        "extra": [("batch.extra", (row,))],
        "state": [(f"params.{sorted(state.params)[recipe.at % len(state.params)]}", ())],
    }.get(recipe.plant, [])
    if recipe.plant in ("loss", "extra", "gradient", "backward"):
        assert found.module is None
    elif recipe.plant == "batch":
        assert found.module == Part("start", "Linear")
    elif recipe.plant == "module":
        planted = [name for name, module in net.named_modules() if isinstance(module, Planted)]
        assert found.module == Part(planted[0], "Planted")
        assert found.before is None
    _check_gradients(recipe, net, found)
    return found


def _check_gradients(recipe: NetRecipe, net: Net, found: Diagnosis) -> None:
    if recipe.plant == "gradient":
        poisoned = next(name for name, module in net.named_modules() if isinstance(module, Scale))
        assert (found.parameter, found.more_parameters) == (f"{poisoned}.weight", 0)
        assert found.backward == Part(poisoned, "Scale")
        assert found.operation == "PoisonedBackward"
    if recipe.plant == "backward":
        source = next(name for name, module in net.named_modules() if isinstance(module, Backfire))
        assert found.backward == Part(source, "Backfire")
        assert found.operation == "BackfiredBackward"
        owners = _names_by_module(net)
        ran = net.sequence()
        nearest = next(owners[name] for name in reversed(ran[: ran.index(source)]) if owners.get(name))
        assert found.parameter in nearest


def _names_by_module(net: nn.Module) -> dict[str, set[str]]:
    """Return, for each module, the trained parameters that it holds itself, under the names that the state has."""
    first = {id(param): name for name, param in net.named_parameters()}
    return {
        name: {first[id(param)] for param in module.parameters(recurse=False) if param.requires_grad}
        for name, module in net.named_modules()
    }


PLANTS = ("batch", "extra", "state", "module", "gradient", "backward", "loss")


@pytest.mark.parametrize("plant", PLANTS)
@settings(max_examples=25)
@given(st.data())
def test_the_planted_thing_is_named(plant: str, data: st.DataObject) -> None:
    check_names(data.draw(nets(plant)))


@pytest.mark.slow
@pytest.mark.parametrize("plant", PLANTS)
def test_the_planted_thing_is_named_in_500_nets(plant: str) -> None:
    told = []

    @settings(max_examples=500)
    @given(nets(plant))
    def check(recipe: NetRecipe) -> None:
        told.append(check_names(recipe).cause)

    check()
    assert len(told) - told.count("none") > 250


# --- controls: diagnosers that are not good enough --------------------------------------------------------------------


def seen_in(step: Step, state: TrainState, batch: Batch) -> tuple[list[tuple[str, str]], list[str]]:
    """The modules with a bad output in the order in which they end, and the bad gradients in the order of names."""
    ended: list[tuple[str, str]] = []

    def hook(name: str) -> Callable[..., None]:
        return lambda module, args, out: None if out.isfinite().all() else ended.append((name, type(module).__name__))

    handles = [module.register_forward_hook(hook(name)) for name, module in step.model.named_modules()]
    grads = step.gradients(state.params, state.buffers, batch).grads
    for handle in handles:
        handle.remove()
    return ended, [name for name, grad in grads.items() if not grad.isfinite().all()]


def last_module(step: Step, state: TrainState, batch: Batch) -> Diagnosis:
    ended, _ = seen_in(step, state, batch)
    return attrs.evolve(diagnose(step, state, batch), module=Part(*ended[-1]))


def first_parameter_by_name(step: Step, state: TrainState, batch: Batch) -> Diagnosis:
    _, bad = seen_in(step, state, batch)
    return attrs.evolve(diagnose(step, state, batch), parameter=bad[0])


def with_a_hook_left_behind(step: Step, state: TrainState, batch: Batch) -> Diagnosis:
    step.model.register_forward_hook(lambda *_: None)
    return diagnose(step, state, batch)


def with_a_draw(step: Step, state: TrainState, batch: Batch) -> Diagnosis:
    torch.rand(1)
    return diagnose(step, state, batch)


def recipe_of(plant: str, **changes: Any) -> NetRecipe:
    base = NetRecipe(
        plant=plant,
        value=math.nan,
        at=1,
        depth=1,
        layers=("linear", "residual", "linear"),
        features=2,
        width=3,
        tied=False,
        frozen=(),
        accumulate=1,
        row=1,
        seed=2,
    )
    return attrs.evolve(base, **changes)


@pytest.mark.parametrize(
    ("plant", "diagnoser"),
    [
        ("module", last_module),
        ("batch", last_module),
        ("backward", first_parameter_by_name),
        ("module", with_a_hook_left_behind),
        ("module", with_a_draw),
    ],
)
def test_control_the_check_catches_a_diagnosis_that_is_wrong(plant: str, diagnoser: Diagnoser) -> None:
    check_names(recipe_of(plant))
    with pytest.raises(AssertionError):
        check_names(recipe_of(plant), diagnoser)


# --- bad numbers that do no harm --------------------------------------------------------------------------------------


class Mask(nn.Module):
    """-inf above the diagonal, [T, T]."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.full((x.shape[1], x.shape[1]), -math.inf).triu(1)


class Masks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Mask()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)[None]


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.query, self.key, self.scores = (nn.Linear(width, width), nn.Linear(width, width), nn.Identity())

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        weights = self.scores(self.query(x) @ self.key(x).transpose(1, 2) + mask)
        return weights.softmax(-1) @ x


class Attending(nn.Module):
    """[B, T, width] -> [B, width]; ``flaw`` and ``meta`` are fields of the batch, of which ``meta`` is not read."""

    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.masks, self.attentions = Masks(), nn.ModuleList(Attention(width) for _ in range(3))
        self.late = nn.Linear(width, width)
        self.register_buffer("fence", torch.full((1,), -math.inf))

    def forward(self, x: Tensor, flaw: Tensor, meta: Tensor) -> Any:
        mask = self.masks(x)
        for attention in self.attentions:
            x = attention(x, mask)
        return SimpleNamespace(logits=torch.where(flaw > 0, self.late(x[:, -1]).log(), x[:, -1]), mask=mask)


def attending_loss(outputs: Any, batch: Batch) -> LossSum:
    return LossSum(total=outputs.logits.sum(), weight=torch.ones(()))


def attending(late: float = 1.0, flaw: float = 0.0) -> tuple[Step, TrainState, Batch]:
    torch.manual_seed(0)
    model, optimizer = Attending(), sgd(0.1)
    nn.init.constant_(model.late.weight, 0.0)
    nn.init.constant_(model.late.bias, late)
    step = make_step(model, loss=attending_loss, optimizer=optimizer)
    batch = {"x": torch.rand(2, 4, 3), "flaw": torch.full((2, 1), flaw), "meta": torch.full((2,), math.nan)}
    return step, trainfn.init(model, optimizer), batch


def test_masks_and_unread_fields_are_not_blamed() -> None:
    step, state, batch = attending()
    ended = _first_bad_output(step, state, batch)
    assert ended == "masks.inner"  # the control: whoever takes the first bad output is fooled
    assert diagnose(step, state, batch).cause == "none"
    step, state, batch = attending(late=math.inf, flaw=1.0)
    found = diagnose(step, state, batch)
    assert [(one.name, one.to_blame) for one in found.spoilt] == [
        ("params.late.bias", True),
        ("buffers.fence", False),
        ("batch.meta", False),
    ]
    assert (found.cause, found.module) == ("parameter", Part("late", "Linear"))
    assert any("batch.meta (rows 0, 1) (did no harm)" in line for line in found.lines)


def test_the_code_of_a_module_is_told_from_its_children() -> None:
    step, state, batch = attending(late=-1.0, flaw=1.0)  # the logarithm of -1, in the model's own forward
    found = diagnose(step, state, batch)
    assert (found.cause, found.module, found.before) == ("module", Part("", "Attending"), None)
    assert "the output of the model (Attending) is not finite" in found.sentence


def test_a_mask_that_masks_all_is_to_blame(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Mask, "forward", lambda self, x: torch.full((x.shape[1], x.shape[1]), -math.inf))
    step, state, batch = attending()
    assert diagnose(step, state, batch).module == Part("masks.inner", "Mask")


def test_a_child_given_something_bad_is_not_blamed() -> None:
    class Spoiling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.child = nn.Sequential(nn.Linear(2, 2))

        def forward(self, x: Tensor) -> Tensor:
            return self.child(x / (x - x))

    model, optimizer = nn.Sequential(nn.Linear(2, 2), Spoiling()), sgd(0.1)
    step = make_step(model, loss="regression", optimizer=optimizer)
    found = diagnose(step, trainfn.init(model, optimizer), (torch.ones(2, 2), torch.ones(2, 2)))
    assert (found.module, found.before) == (Part("1", "Spoiling"), "1.child")
    assert "the code of 1 (Spoiling) made it before it called 1.child" in found.sentence


def _first_bad_output(step: Step, state: TrainState, batch: Batch) -> str:
    ended: list[str] = []
    handles = [
        module.register_forward_hook(
            lambda _m, _a, out, name=name: (
                None if not isinstance(out, Tensor) or out.isfinite().all() else ended.append(name)
            )
        )
        for name, module in step.model.named_modules()
    ]
    step.forward(state.params, dict(state.buffers), batch)
    for handle in handles:
        handle.remove()
    return ended[0]


# --- gradients --------------------------------------------------------------------------------------------------------


class Log(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.log()


class Guarded(nn.Module):
    """The well-known trap: the logarithm of 0 is thrown away, and its derivative is not."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.log = nn.Parameter(torch.ones(2)), Log()

    def forward(self, x: Tensor) -> Tensor:
        scaled = x * self.scale
        return torch.where(scaled > 0, self.log(scaled), 0.0)


def total(outputs: Tensor, batch: Batch) -> LossSum:
    return LossSum(total=outputs.sum(), weight=torch.ones(()))


def diagnosed(model: nn.Module, batch: Any, loss: Any = total, **options: Any) -> Diagnosis:
    optimizer = sgd(0.1)
    precision = options.get("precision", "32-true")
    step = make_step(model, loss=loss, optimizer=optimizer, **options)
    return diagnose(step, trainfn.init(model, optimizer, precision=precision), batch)


def test_the_operation_whose_backward_is_bad_is_named() -> None:
    found = diagnosed(Guarded(), {"x": torch.tensor([[0.0, 1.0]])})
    assert (found.cause, found.loss) == ("gradient", 0.0)
    assert (found.backward, found.operation, found.parameter) == (Part("log", "Log"), "LogBackward0", "scale")
    assert "LogBackward0 in the backward of log (Log) made it" in found.sentence


class Times(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.other = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight + self.other


def test_a_sum_of_micro_batches_that_overflows_is_told_as_that() -> None:
    found = diagnosed(Times(), {"x": torch.full((3, 2), 3e38)}, accumulate=3)
    assert (found.cause, found.parameter, found.micro_batch, found.micro_batches) == ("sum", "weight", 2, 3)
    assert "the sum of the micro-batches overflowed in weight" in found.sentence


def test_a_sum_of_losses_that_overflows_is_told_as_that() -> None:
    def loss(outputs: Tensor, batch: Batch) -> LossSum:
        return LossSum(total=outputs.sum() + 3e38, weight=torch.ones(()))

    found = diagnosed(Times(), {"x": torch.ones(3, 2)}, loss, accumulate=3)
    assert (found.cause, found.parameter, found.micro_batch) == ("sum", None, 2)
    assert "overflowed in the loss" in found.sentence


def test_the_largest_gradients_of_a_finite_step_are_named() -> None:
    found = diagnosed(Times(), {"x": torch.full((4, 2), 1e30)}, accumulate=2)
    assert found.cause == "none"
    assert [name for name, _ in found.largest] == ["weight", "other"]
    assert found.largest[0][1] == pytest.approx(2e30 * math.sqrt(2))  # the mean: two micro-batches, each of weight 1
    assert found.lines[-1].startswith("largest gradients: weight 2.828e+30, other ")
    assert "shows nothing that is not finite" in found.sentence


def test_a_batch_in_which_nothing_counts_is_told_as_that() -> None:
    found = diagnosed(nn.Linear(2, 2), (torch.ones(2, 2), torch.full((2,), -100)), "classification")
    assert (found.cause, found.largest) == ("none", ())
    assert "nothing in the batch counted" in found.sentence


# --- 16 bits ----------------------------------------------------------------------------------------------------------


def wide(value: float) -> nn.Module:
    model = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2, bias=False))
    nn.init.constant_(model[2].weight, value)
    return model


def test_an_overflow_of_float16_is_named_where_it_is() -> None:
    batch = torch.full((2, 2), 10.0), torch.zeros(2, 2)
    forward = diagnosed(wide(6e4), batch, "regression", precision="16-mixed")
    assert (forward.cause, forward.module) == ("module", Part("2", "Linear"))
    backward = diagnosed(wide(3e3), batch, "regression", precision="16-mixed")
    assert (backward.cause, backward.module) == ("gradient", None)
    assert (backward.parameter, backward.more_parameters) == ("2.weight", 2)
    assert diagnosed(wide(6e4), batch, "regression", precision="bf16-mixed").cause == "none"


def test_a_batch_that_float16_cannot_hold_is_told_as_that() -> None:
    found = diagnosed(wide(1.0), (torch.full((2, 2), 1e5), torch.zeros(2, 2)), "regression", precision="16-mixed")
    assert (found.cause, found.spoilt) == ("cast", ())
    assert "not when cast" in found.sentence


# --- and around it ----------------------------------------------------------------------------------------------------


def test_what_the_model_raises_is_raised_and_no_hook_stays() -> None:
    class Raising(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("on purpose")

    model, optimizer = nn.Sequential(nn.Linear(2, 2), Raising(2, 2)), sgd(0.1)
    step, state = make_step(model, loss=total, optimizer=optimizer), trainfn.init(model, optimizer)
    batch = {"x": torch.ones(1, 2)}
    before = surroundings_of(model, state, batch)
    with pytest.raises(RuntimeError, match="on purpose"):
        diagnose(step, state, batch)
    assert surroundings_of(model, state, batch) == before


def test_a_model_that_cannot_take_mended_numbers_is_diagnosed_by_what_was_seen() -> None:
    class Choosy(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            if x.isfinite().all():
                raise RuntimeError("another way")
            return super().forward(x)

    found = diagnosed(nn.Sequential(nn.Tanh(), Choosy(2, 2)), {"x": torch.full((1, 2), math.nan)})
    assert (found.cause, found.spoilt[0].to_blame) == ("batch", True)


def test_activation_checkpointing() -> None:
    class Again(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.inner = nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), Planted(nn.Tanh(), math.nan))

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.inner, self.first(x), use_reentrant=False)

    found = diagnosed(Again(), {"x": torch.ones(1, 2)})
    assert (found.cause, found.module) == ("module", Part("inner.1", "Planted"))


def test_a_net_of_the_laws_with_one_poisoned_gradient() -> None:
    for name in ("first.weight", "head.bias", "temperature"):
        setup = Setup(
            MlpRecipe(blocks=("batch_norm", "layer_norm"), dropout=0.3, poisoned=name), adamw(0.1), accumulate=2
        )
        model = setup.net.model()
        batch = setup.batch() | {"poison": torch.tensor([0.0, 0.0, 0.0, 0.0, math.nan, 0.0])}
        found = diagnose(setup.step(model), setup.state(model), batch)
        assert (found.cause, found.parameter, found.more_parameters) == ("batch", name, 0)
        assert (found.micro_batch, found.spoilt[0].name, found.spoilt[0].rows) == (2, "batch.poison", (4,))


def test_a_batch_of_one_tensor_and_many_bad_rows() -> None:
    batch = torch.ones(30, 2)
    batch[5:] = math.inf
    found = diagnosed(nn.Linear(2, 2), batch, lambda outputs, batch: outputs.mean())
    assert found.spoilt[0] == attrs.evolve(found.spoilt[0], name="batch", count=25, rows=tuple(range(5, 15)))
    assert "batch (rows 5, 6, 7, 8, 9, 10, 11, 12, 13, 14 and 15 more) not finite" in found.sentence
    assert json.loads(json.dumps(found.to_json())) == found.to_json()
