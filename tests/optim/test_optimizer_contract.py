"""What PyTorch expects of every optimizer, and how little ARS2-Neo asks of the device."""

import copy
import io
import pickle
from collections import Counter

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import ConstantLR, ExponentialLR, ReduceLROnPlateau, SequentialLR
from torch.utils._python_dispatch import TorchDispatchMode

from tiny_onn.optim import ARS2Neo, orthogonalize, param_groups

MODES = ("off", "sync", "delayed", "adaptive")


class Operators(TorchDispatchMode):
    """Counts what reaches the dispatcher."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.counts[str(function)] += 1
        return function(*args, **(kwargs or {}))

    @property
    def host_reads(self):
        names = ("_local_scalar_dense", "is_nonzero", "aten.item", "aten.equal", "aten.nonzero")
        return sum(n for name, n in self.counts.items() if any(x in name for x in names))


def many():
    torch.manual_seed(0)
    shapes = [(64, 64)] * 24 + [(16, 32, 32)] * 8 + [(64,)] * 24
    return [nn.Parameter(torch.randn(shape)) for shape in shapes]


def give_gradients(parameters, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for p in parameters:
        p.grad = torch.randn(p.shape, generator=generator)


def test_operators_and_host_reads_of_a_step():
    parameters = many()
    optimizer = ARS2Neo(parameters)
    give_gradients(parameters)
    optimizer.step()
    with Operators() as seen:
        optimizer.step()
    assert seen.host_reads == 0
    assert sum(seen.counts.values()) <= 250


@pytest.mark.parametrize(("mode", "expected"), [("sync", 0), ("delayed", 0), ("adaptive", 1)])
def test_host_reads_with_second_passes(mode, expected):
    parameters = many()
    optimizer = ARS2Neo(parameters, sam=mode, sync_every=100)

    def closure():
        give_gradients(parameters)

    for _ in range(3):
        optimizer.step(closure)
    with Operators() as seen:
        optimizer.step(closure)
    assert seen.host_reads == expected


def test_the_counter_sees_a_host_read():
    with Operators() as seen:
        torch.ones(3).sum().item()
    assert seen.host_reads == 1


def test_diagnostics_are_read_when_asked_for():
    parameters = many()
    groups = [{"params": parameters[:32]}, {"params": parameters[32:], "lr": 0.5}]
    optimizer = ARS2Neo(groups, lr=0.1, weight_decay=0.0)
    assert optimizer.diagnostics["grad_norm"] == 0.0
    give_gradients(parameters)
    before = [p.detach().clone() for p in parameters]
    optimizer.step()
    with Operators() as seen:
        figures = optimizer.diagnostics
    assert seen.host_reads > 0
    every = torch.cat([p.grad.flatten() for p in parameters])
    assert figures["grad_norm"] == pytest.approx(float(every.norm()), rel=1e-5)
    moved = [a - p.detach() for a, p in zip(before, parameters, strict=True)]
    for rms, members, lr in zip(
        figures["update_rms"], (moved[:32], moved[32:]), (0.1, 0.5), strict=True
    ):
        flat = torch.cat([x.flatten() for x in members]) / lr
        assert rms == pytest.approx(float(flat.square().mean().sqrt()), rel=1e-4)


# The checks of torch.testing._internal.common_optimizers, for every mode.


def regression(mode, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 1))
    optimizer = ARS2Neo(param_groups(model), **({"lr": 0.02, "sam": mode} | options))
    x = torch.randn(32, 5)
    y = x[:, :1] * x[:, 1:2]

    def closure():
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        return loss

    return model, optimizer, closure


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("tensor", [False, True])
@pytest.mark.parametrize(
    "schedulers",
    [
        [],
        [lambda o: ExponentialLR(o, 0.98)],
        [lambda o: SequentialLR(o, [ConstantLR(o, 0.5, 3), ExponentialLR(o, 0.98)], [5])],
        [lambda o: ExponentialLR(o, 0.99), lambda o: ReduceLROnPlateau(o)],
    ],
    ids=["none", "exponential", "sequential", "plateau"],
)
def test_it_goes_in_the_right_direction(mode, tensor, schedulers):
    lr = torch.tensor(0.02) if tensor else 0.02
    _, optimizer, closure = regression(mode, lr=lr)
    made = [make(optimizer) for make in schedulers]
    first = closure().item()
    for _ in range(20):
        loss = optimizer.step(closure)
        for scheduler in made:
            if isinstance(scheduler, ReduceLROnPlateau):
                scheduler.step(loss.detach())
            else:
                scheduler.step()
    assert closure().item() < 0.8 * first


@pytest.mark.parametrize("mode", MODES)
def test_groups_have_their_own_rate_and_decay(mode):
    for option, least in (("lr", 0.0), ("weight_decay", 0.0)):
        p, q = nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.ones(4, 4))
        groups = [{"params": [p], option: 0.1}, {"params": [q], option: least}]
        optimizer = ARS2Neo(groups, lr=0.1, weight_decay=0.0, sam=mode)

        def closure(p=p, q=q, still=option == "weight_decay"):
            for x in (p, q):
                x.grad = torch.zeros_like(x) if still else torch.ones_like(x)

        optimizer.step(closure)
        assert not torch.equal(p.detach(), torch.ones(4, 4))
        assert torch.equal(q.detach(), torch.ones(4, 4))


@pytest.mark.parametrize("mode", MODES)
def test_nothing_moves_without_gradients(mode):
    parameters = [nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(4))]
    before = [p.detach().clone() for p in parameters]
    optimizer = ARS2Neo(parameters, sam=mode)
    optimizer.step(lambda: None)
    assert all(torch.equal(a, p.detach()) for a, p in zip(before, parameters, strict=True))
    assert all(optimizer.updates(p) == 0 for p in parameters)


@pytest.mark.parametrize("mode", MODES)
def test_nothing_moves_for_zero_gradients(mode):
    parameters = [nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(4))]
    before = [p.detach().clone() for p in parameters]
    optimizer = ARS2Neo(parameters, sam=mode, weight_decay=0.0)

    def closure():
        for p in parameters:
            p.grad = torch.zeros_like(p)

    for _ in range(3):
        optimizer.step(closure)
    assert all(torch.equal(a, p.detach()) for a, p in zip(before, parameters, strict=True))


@pytest.mark.parametrize("mode", MODES)
def test_state_dicts_are_deterministic_and_shared_with_nobody(mode):
    model, optimizer, closure = regression(mode)
    for _ in range(4):
        optimizer.step(closure)
    other_model, other, other_closure = regression(mode)
    other_model.load_state_dict(model.state_dict())
    kept = optimizer.state_dict()
    snapshot = copy.deepcopy(kept)
    other.load_state_dict(kept)
    for _ in range(4):
        other.step(other_closure)
    for index, state in kept["state"].items():
        for name, value in state.items():
            assert torch.equal(value, snapshot["state"][index][name])
    for _ in range(4):
        optimizer.step(closure)
    assert torch.equal(weights(model), weights(other_model))


@pytest.mark.parametrize("mode", MODES)
def test_a_state_goes_through_weights_only_loading(mode):
    model, optimizer, closure = regression(mode)
    for _ in range(3):
        optimizer.step(closure)
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    other_model, other, other_closure = regression(mode)
    other_model.load_state_dict(model.state_dict())
    other.load_state_dict(torch.load(buffer, weights_only=True))
    for _ in range(3):
        optimizer.step(closure)
        other.step(other_closure)
    assert torch.equal(weights(model), weights(other_model))


def test_older_states_load():
    model, optimizer, closure = regression("adaptive")
    for _ in range(3):
        optimizer.step(closure)
    state = optimizer.state_dict()
    for entry in state["state"].values():
        entry["step"] = entry["step"].item()
        del entry["shear"]
    for group in state["param_groups"]:
        del group["aga"]
    _, other, other_closure = regression("adaptive")
    other.load_state_dict(state)
    p = next(iter(other.state))
    assert other.updates(p) == 3 and other.state[p]["step"].dtype == torch.float32
    other.step(other_closure)


@pytest.mark.parametrize("mode", MODES)
def test_a_run_without_second_passes_goes_on_with_them(mode):
    model, optimizer, closure = regression("off")
    for _ in range(3):
        optimizer.step(closure)
    other_model, other, other_closure = regression(mode)
    other_model.load_state_dict(model.state_dict())
    other.load_state_dict(optimizer.state_dict())
    calls = []

    def counted():
        calls.append(1)
        return other_closure()

    other.step(counted)
    assert len(calls) == (1 if mode == "off" else 2)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("how", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_copies_have_every_attribute_and_step(mode, how):
    _, optimizer, closure = regression(mode)
    optimizer.step(closure)
    again = how(optimizer)
    public = {name for name in vars(optimizer) if not name.startswith("_")}
    assert public == {name for name in vars(again) if not name.startswith("_")}
    assert again.diagnostics == optimizer.diagnostics

    def other_closure():
        for group in again.param_groups:
            for p in group["params"]:
                p.grad = torch.ones_like(p)

    again.step(other_closure)
    assert f"{again!r}".startswith("ARS2Neo (")


@pytest.mark.parametrize("mode", MODES)
def test_hooks_run_once_a_step(mode):
    _, optimizer, closure = regression(mode)
    seen = []
    handles = [
        optimizer.register_step_pre_hook(lambda *_: seen.append("before")),
        optimizer.register_step_post_hook(lambda *_: seen.append("after")),
        optimizer.register_state_dict_pre_hook(lambda *_: seen.append("save")),
        optimizer.register_state_dict_post_hook(lambda *_: seen.append("saved")),
        optimizer.register_load_state_dict_pre_hook(lambda *_: seen.append("load")),
        optimizer.register_load_state_dict_post_hook(lambda *_: seen.append("loaded")),
    ]
    optimizer.step(closure)
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen == ["before", "after", "save", "saved", "load", "loaded"]
    for handle in handles:
        handle.remove()
    optimizer.step(closure)
    assert len(seen) == 6


@pytest.mark.parametrize("mode", MODES)
def test_two_dtypes_in_one_group(mode):
    parameters = [nn.Parameter(torch.randn(4, 6, dtype=d)) for d in (torch.float32, torch.float64)]
    optimizer = ARS2Neo(parameters, sam=mode)

    def closure():
        for p in parameters:
            p.grad = torch.ones_like(p)

    for _ in range(2):
        optimizer.step(closure)
    assert [p.dtype for p in parameters] == [torch.float32, torch.float64]


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda p: ARS2Neo(p), TypeError, "params argument"),
        (lambda p: ARS2Neo([]), ValueError, "empty parameter list"),
        (lambda p: ARS2Neo([{"params": [p]}, {"params": [p]}]), ValueError, "more than one"),
        (lambda p: ARS2Neo([p * 1]), ValueError, "non-leaf"),
        (lambda p: ARS2Neo([p], lr=torch.ones(2)), ValueError, r"1 element. Got shape \(2,\)"),
        (lambda p: ARS2Neo([{"params": [p], "lr": -1.0}]), ValueError, "lr must be .* Got -1.0"),
        (lambda p: ARS2Neo([{"params": [p], "flatten": 3}]), ValueError, "flatten must be one of"),
        (
            lambda p: ARS2Neo([p]).load_state_dict({"state": {}, "param_groups": []}),
            ValueError,
            "group",
        ),
    ],
)
def test_mistakes_are_named(make, error, message):
    with pytest.raises(error, match=message):
        make(nn.Parameter(torch.ones(2, 2)))


# Convolution kernels.


def test_a_kernel_is_a_matrix_only_when_asked():
    conv = nn.Conv1d(3, 8, 5)
    with pytest.raises(ValueError, match=r"weight of Conv1d .* flatten=True"):
        param_groups(conv)
    kernel, bias = param_groups(conv, flatten=True)
    assert kernel["flatten"] and kernel["params"][0] is conv.weight
    assert bias["params"][0] is conv.bias and not bias["orthogonal"]
    with pytest.raises(ValueError, match="set flatten=True"):
        ARS2Neo([nn.Parameter(torch.ones(2, 2, 2, 2))], orthogonal=True)


@pytest.mark.parametrize("shape", [(8, 3, 5), (8, 3, 2, 2)])
def test_a_flattened_kernel_moves_like_its_matrix(shape):
    torch.manual_seed(0)
    kernel = nn.Parameter(torch.randn(shape))
    matrix = nn.Parameter(kernel.detach().flatten(1).clone())
    a, b = ARS2Neo([kernel], flatten=True), ARS2Neo([matrix])
    for _ in range(3):
        kernel.grad = torch.randn(shape)
        matrix.grad = kernel.grad.flatten(1).clone()
        a.step()
        b.step()
    assert torch.equal(kernel.detach().flatten(1), matrix.detach())


def test_a_convolutional_network_trains():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(24, 1))
    optimizer = ARS2Neo(param_groups(model, flatten=True), lr=0.02, sam="adaptive")
    x = torch.randn(64, 1, 8)
    y = x[:, 0, 2:3] * x[:, 0, 3:4]

    def closure():
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        return loss

    losses = [float(optimizer.step(closure).detach()) for _ in range(60)]
    assert losses[-1] < 0.5 * losses[0]


# Buckets.


def test_matrices_of_one_shape_in_two_dtypes_are_not_stacked():
    torch.manual_seed(0)
    both = [nn.Parameter(torch.randn(4, 6, dtype=d)) for d in (torch.float32, torch.float64)]
    alone = [nn.Parameter(p.detach().clone()) for p in both]
    together, apart = ARS2Neo(both), [ARS2Neo([p]) for p in alone]
    for p, q in zip(both, alone, strict=True):
        p.grad = torch.randn_like(p)
        q.grad = p.grad.clone()
    together.step()
    for optimizer in apart:
        optimizer.step()
    assert all(torch.equal(p.detach(), q.detach()) for p, q in zip(both, alone, strict=True))


def test_auto_iterates_small_matrices_in_float32():
    x = torch.randn(2, 32, 48)
    assert torch.equal(orthogonalize(x, dtype="auto"), orthogonalize(x))
    wide = torch.randn(2, 128, 256)
    torch.testing.assert_close(
        orthogonalize(wide, dtype="auto"), orthogonalize(wide), atol=0.05, rtol=0
    )
    assert orthogonalize(x.double(), dtype="auto").dtype == torch.float64


# The usual test functions, on the AdamW track; matrices have their own below.

FUNCTIONS = {
    "rosenbrock": (lambda x: (1 - x[0]) ** 2 + 100 * (x[1] - x[0] ** 2) ** 2, (-1.2, 1.0)),
    "beale": (
        lambda x: sum(
            (c - x[0] + x[0] * x[1] ** k) ** 2 for k, c in ((1, 1.5), (2, 2.25), (3, 2.625))
        ),
        (1.0, 1.0),
    ),
    "himmelblau": (
        lambda x: (x[0] ** 2 + x[1] - 11) ** 2 + (x[0] + x[1] ** 2 - 7) ** 2,
        (0.0, 0.0),
    ),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_it_finds_the_minimum_of_a_test_function(mode, name):
    function, start = FUNCTIONS[name]
    x = nn.Parameter(torch.tensor(start, dtype=torch.float64))
    optimizer = ARS2Neo([x], lr=0.05, weight_decay=0.0, sam=mode, rho=1e-3, betas=(0.9, 0.99))
    cooldown = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=1500)

    def closure():
        optimizer.zero_grad()
        value = function(x)
        value.backward()
        return value.detach()

    first = float(closure())
    for _ in range(1500):
        optimizer.step(closure)
        cooldown.step()
    assert float(closure()) < 1e-3 * first


@pytest.mark.parametrize("mode", MODES)
def test_a_matrix_is_factorised(mode):
    torch.manual_seed(0)
    target = torch.randn(12, 3) @ torch.randn(3, 10)
    a, b = nn.Parameter(0.3 * torch.randn(12, 3)), nn.Parameter(0.3 * torch.randn(3, 10))
    optimizer = ARS2Neo([a, b], lr=0.05, weight_decay=0.0, sam=mode, rho=1e-3)
    cooldown = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=600)

    def closure():
        optimizer.zero_grad()
        loss = (a @ b - target).square().mean()
        loss.backward()
        return loss.detach()

    first = float(closure())
    for _ in range(600):
        optimizer.step(closure)
        cooldown.step()
    assert float(closure()) < 1e-3 * first
