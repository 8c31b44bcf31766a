"""ARS2-Neo against an oracle of its formulas, AdamW, and everything that can go wrong."""

import copy
import io

import numpy as np
import pytest
import torch
from torch import nn

from tiny_onn.optim import ARS2Neo, param_groups

MODES = ("off", "sync", "delayed", "adaptive")


def problem(seed: int = 0) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))
    x = torch.randn(32, 6)
    return model, x, torch.sin(x @ torch.randn(6, 3))


def closure_of(model, optimizer, x, y, calls=None):
    def closure():
        if calls is not None:
            calls.append(1)
        optimizer.zero_grad()
        loss = (model(x) - y).pow(2).mean()
        loss.backward()
        return loss

    return closure


def oracle_step(w, g, m, v, t, *, lr, b1, b2, eps, decay, scale):
    """One step of the formula in float64, with the exact polar factor by SVD."""
    m = b1 * m + (1 - b1) * g
    v = b2 * v + (1 - b2) * g * g
    u = (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + eps)
    left, _, right = np.linalg.svd(u, full_matrices=False)
    energy = np.linalg.norm(u) / (np.sqrt(min(u.shape)) if scale == "rms" else 1.0)
    return (1 - lr * decay) * w - lr * energy * (left @ right), m, v


def polar(x: torch.Tensor) -> torch.Tensor:
    left, _, right = torch.linalg.svd(x, full_matrices=False)
    return left @ right


@pytest.mark.parametrize("scale", ["rms", "energy"])
@pytest.mark.parametrize("shape", [(5, 9), (9, 5)])
def test_twenty_steps_equal_the_oracle(scale, shape):
    rng = np.random.default_rng(0)
    w = rng.normal(size=shape)
    p = nn.Parameter(torch.tensor(w))
    options = {"lr": 0.02, "weight_decay": 0.1, "betas": (0.9, 0.95), "eps": 1e-8}
    optimizer = ARS2Neo([p], **options, update_scale=scale, newton_schulz=polar)
    m, v = np.zeros(shape), np.zeros(shape)
    for t in range(1, 21):
        g = rng.normal(size=shape)
        p.grad = torch.tensor(g)
        optimizer.step()
        w, m, v = oracle_step(
            w, g, m, v, t, lr=0.02, b1=0.9, b2=0.95, eps=1e-8, decay=0.1, scale=scale
        )
        np.testing.assert_allclose(p.detach().numpy(), w, rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(optimizer.second_moment(p).numpy(), v, rtol=1e-12)
    assert optimizer.updates(p) == 20


@pytest.mark.parametrize("amsgrad_free_lr", [1e-2, torch.tensor(1e-2)])
def test_vectors_equal_torch_adamw(amsgrad_free_lr):
    torch.manual_seed(0)
    ours = nn.Parameter(torch.randn(50))
    theirs = nn.Parameter(ours.detach().clone())
    a = ARS2Neo([ours], lr=amsgrad_free_lr, betas=(0.9, 0.999), weight_decay=0.1)
    b = torch.optim.AdamW([theirs], lr=1e-2, betas=(0.9, 0.999), weight_decay=0.1)
    for _ in range(40):
        ours.grad = torch.randn(50)
        theirs.grad = ours.grad.clone()
        a.step()
        b.step()
        assert (ours - theirs).abs().max() < 1e-6


def test_a_stack_of_experts_equals_separate_matrices():
    torch.manual_seed(0)
    stacked = nn.Parameter(torch.randn(4, 6, 10))
    apart = [nn.Parameter(stacked.detach()[e].clone()) for e in range(4)]
    a, b = ARS2Neo([stacked], lr=0.05), ARS2Neo(apart, lr=0.05)
    for _ in range(5):
        stacked.grad = torch.randn(4, 6, 10)
        for e, p in enumerate(apart):
            p.grad = stacked.grad[e].clone()
        a.step()
        b.step()
    assert torch.equal(stacked.detach(), torch.stack([p.detach() for p in apart]))


def test_rms_scale_gives_adams_root_mean_square():
    torch.manual_seed(0)
    p = nn.Parameter(torch.zeros(64, 64))
    optimizer = ARS2Neo([p], lr=1.0, weight_decay=0.0, newton_schulz=polar)
    p.grad = torch.randn(64, 64)
    optimizer.step()
    # In the first step Adam's update is the sign of the gradient: its root mean square is 1.
    assert p.detach().pow(2).mean().sqrt() == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize(
    ("mode", "expected"), [("off", 20), ("sync", 40), ("delayed", 24), (None, 20)]
)
def test_how_often_the_closure_is_called(mode, expected):
    model, x, y = problem()
    optimizer = ARS2Neo(param_groups(model), lr=1e-2, sam=mode or "off", sync_every=5)
    calls: list[int] = []
    for _ in range(20):
        optimizer.step(closure_of(model, optimizer, x, y, calls))
    assert len(calls) == expected


def test_adaptive_pays_for_its_passes_and_reports_them():
    model, x, y = problem()
    optimizer = ARS2Neo(param_groups(model), lr=1e-2, sam="adaptive", sync_every=8)
    calls: list[int] = []
    for _ in range(60):
        optimizer.step(closure_of(model, optimizer, x, y, calls))
    figures = optimizer.diagnostics
    assert len(calls) == 60 + figures["syncs"]
    assert 60 / 8 <= figures["syncs"] < 60
    assert -1 <= figures["phi"] <= 1 and figures["sigma"] > 0


def test_never_triggered_adaptive_syncs_like_delayed():
    results = []
    for mode, extra in (("delayed", {}), ("adaptive", {"aga_lambda": 1e9, "gamma": 0.0})):
        model, x, y = problem()
        optimizer = ARS2Neo(param_groups(model), lr=1e-2, sam=mode, sync_every=4, **extra)
        for _ in range(12):
            optimizer.step(closure_of(model, optimizer, x, y))
        results.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*results)


def test_vanishing_radius_equals_off():
    results = []
    for options in ({"sam": "off"}, {"sam": "sync", "rho": 1e-30}):
        model, x, y = problem()
        optimizer = ARS2Neo(param_groups(model), lr=1e-2, **options)
        for _ in range(10):
            optimizer.step(closure_of(model, optimizer, x, y))
        results.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*results)


@pytest.mark.parametrize("scope", ["global", "tensor"])
def test_the_perturbation_is_the_formula(scope):
    torch.manual_seed(0)
    ps = [nn.Parameter(torch.randn(3, 4, dtype=torch.float64)) for _ in range(2)]
    optimizer = ARS2Neo(ps, sam="sync", rho=0.3, perturb_scope=scope, betas=(0.9, 0.95))
    before = [p.detach().clone() for p in ps]
    for p in ps:
        p.grad = torch.randn_like(p)
    g = [p.grad.clone() for p in ps]
    assert optimizer.first_step()
    # v' = (1 - b2) g², bias-corrected in step 1: g²; so q = |w| g / (|g| + eps).
    q = [w.abs() * x / (x.abs() + 1e-8) for w, x in zip(before, g, strict=True)]
    whole = torch.stack([x.norm() for x in q]).norm()
    for p, w, x in zip(ps, before, q, strict=True):
        radius = x.norm() if scope == "tensor" else whole
        torch.testing.assert_close(p.detach(), w + 0.3 * x / radius)
    optimizer.second_step()


def test_the_shear_force_is_orthogonal_and_added_between_syncs():
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(8, dtype=torch.float64))
    optimizer = ARS2Neo([p], sam="delayed", sync_every=10, alpha=0.5, orthogonal=False)
    plain, adversarial = torch.randn(2, 8, dtype=torch.float64)
    p.grad = plain.clone()
    assert optimizer.first_step()
    p.grad = adversarial.clone()
    optimizer.second_step()
    shear = optimizer.state[p]["shear"]
    assert abs(float(shear @ plain)) < 1e-6
    torch.testing.assert_close(
        shear, adversarial - (adversarial @ plain) / (plain @ plain) * plain, rtol=1e-5, atol=1e-6
    )
    g = torch.randn(8, dtype=torch.float64)
    p.grad = g.clone()
    assert not optimizer.first_step()
    expected = g + 0.5 * g.norm() / shear.norm() * shear
    torch.testing.assert_close(p.grad, expected, rtol=1e-5, atol=1e-6)


def test_both_passes_see_the_same_dropout():
    model = nn.Sequential(nn.Linear(4, 64), nn.Dropout(0.5), nn.Linear(64, 1))
    optimizer = ARS2Neo(param_groups(model), lr=1e-2, sam="sync")
    masks = []
    model[1].register_forward_hook(lambda module, args, out: masks.append((out == 0).clone()))
    optimizer.step(closure_of(model, optimizer, torch.ones(8, 4), torch.zeros(8, 1)))
    assert len(masks) == 2 and torch.equal(*masks)


@pytest.mark.parametrize("mode", ["sync", "delayed", "adaptive"])
def test_an_exception_in_the_second_pass_changes_nothing(mode):
    model, x, y = problem()
    optimizer = ARS2Neo(param_groups(model), lr=1e-2, sam=mode)
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    calls: list[int] = []
    plain = closure_of(model, optimizer, x, y, calls)

    def closure():
        if len(calls) == 1:
            raise RuntimeError("pulled plug")
        return plain()

    with pytest.raises(RuntimeError, match="pulled plug"):
        optimizer.step(closure)
    assert_same((model.state_dict(), optimizer.state_dict()), before)
    optimizer.step(plain)


def test_a_second_pass_that_is_not_finite_counts_for_nothing():
    results = []
    for poison in (False, True):
        model, x, y = problem()
        optimizer = ARS2Neo(param_groups(model), lr=1e-2, sam="sync", rho=0.0)
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(3))
        optimizer.first_step()
        if poison:
            next(model.parameters()).grad.fill_(float("nan"))
        optimizer.second_step()
        results.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*results)


def test_a_gradient_missing_in_one_pass():
    a, b = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = ARS2Neo([a, b], sam="sync", weight_decay=0.0)
    a.grad = torch.ones(3)
    optimizer.first_step()
    a.grad, b.grad = None, torch.ones(3)
    optimizer.second_step()
    assert (a < 1).all() and (b < 1).all()
    assert optimizer.updates(a) == optimizer.updates(b) == 1


def test_an_expert_that_wakes_up_late_has_its_own_age():
    early, late = nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.ones(4, 4))
    optimizer = ARS2Neo([early, late], lr=0.1)
    for _ in range(3):
        early.grad = torch.ones(4, 4)
        optimizer.step()
    assert torch.equal(late, torch.ones(4, 4)) and optimizer.updates(late) == 0
    early.grad = late.grad = torch.eye(4)
    optimizer.step()
    assert optimizer.updates(late) == 1 and late.isfinite().all()


def test_zero_gradients_move_nothing_but_the_decay():
    p = nn.Parameter(torch.ones(4, 4))
    optimizer = ARS2Neo([p], lr=0.1, weight_decay=0.0)
    p.grad = torch.zeros(4, 4)
    optimizer.step()
    assert torch.equal(p.detach(), torch.ones(4, 4))


@pytest.mark.parametrize("mode", MODES)
def test_resume_is_exact_bit_for_bit(mode):
    def run(steps, model, optimizer, x, y):
        return [optimizer.step(closure_of(model, optimizer, x, y)).item() for _ in range(steps)]

    def build():
        model, x, y = problem()
        return model, ARS2Neo(param_groups(model), lr=1e-2, sam=mode, sync_every=3), x, y

    whole = build()
    losses = run(12, *whole)
    first = build()
    start = run(7, *first)
    buffer = io.BytesIO()
    torch.save((first[0].state_dict(), first[1].state_dict()), buffer)
    buffer.seek(0)
    model_state, optimizer_state = torch.load(buffer, weights_only=True)
    second = build()
    second[0].load_state_dict(model_state)
    second[1].load_state_dict(optimizer_state)
    assert start + run(5, *second) == losses


def test_state_is_made_at_once_and_holds_no_scratch():
    model, x, y = problem()
    optimizer = ARS2Neo(param_groups(model), sam="adaptive")
    names = {"exp_avg", "exp_avg_sq", "step", "shear"}
    assert all(set(optimizer.state[p]) == names for p in model.parameters())
    optimizer.step(closure_of(model, optimizer, x, y))
    assert all(set(optimizer.state[p]) == names for p in model.parameters())


def test_deepcopy_schedulers_and_new_groups():
    model, x, y = problem()
    optimizer = ARS2Neo(list(model[0].parameters()), lr=1e-2)
    optimizer.add_param_group({"params": list(model[2].parameters()), "lr": 5e-3})
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    optimizer.step(closure_of(model, optimizer, x, y))
    scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == [5e-3, 2.5e-3]
    twin_model, twin = copy.deepcopy((model, optimizer))
    optimizer.step(closure_of(model, optimizer, x, y))
    twin.step(closure_of(twin_model, twin, x, y))
    assert_same(twin_model.state_dict(), model.state_dict())


def test_step_without_a_closure():
    p = nn.Parameter(torch.ones(3))
    optimizer = ARS2Neo([p], sam="adaptive", lr=0.1)
    p.grad = torch.ones(3)
    with pytest.raises(ValueError, match="needs a closure when sam='adaptive'"):
        optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step()  # as torch.distributed.checkpoint does, to make the state exist


def test_bfloat16_autocast_accumulation_and_clipping():
    model, x, y = problem()
    optimizer = ARS2Neo(param_groups(model), lr=1e-2, sam="adaptive")

    def closure():
        optimizer.zero_grad()
        total = torch.zeros(())
        for part in range(2):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                out = model(x[part::2])
            loss = (out.float() - y[part::2]).pow(2).mean() / 2
            loss.backward()
            total += loss.detach()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        return total

    first = optimizer.step(closure)
    for _ in range(80):
        last = optimizer.step(closure)
    assert last < 0.6 * first


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("track", [True, False])
def test_convergence_on_a_quadratic_bowl(mode, track):
    torch.manual_seed(0)
    target = torch.randn(6, 6)
    p = nn.Parameter(torch.zeros(6, 6))
    optimizer = ARS2Neo([p], lr=0.05, weight_decay=0.0, sam=mode, orthogonal=track)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, total_iters=200)

    def closure():
        optimizer.zero_grad()
        loss = (p - target).pow(2).sum()
        loss.backward()
        return loss

    first = optimizer.step(closure)
    for _ in range(200):
        last = optimizer.step(closure)
        scheduler.step()
    assert last < 1e-2 * first


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr must be at least 0. Got -1.0"),
        ({"betas": (1.0, 0.9)}, r"betas\[0\] must be in \[0, 1\). Got 1.0"),
        ({"eps": -1e-8}, "eps must be at least 0"),
        ({"weight_decay": -0.1}, "weight_decay must be at least 0"),
        ({"sam": "often"}, "sam must be one of off, sync, delayed, adaptive. Got 'often'"),
        ({"rho": -0.1}, "rho must be at least 0"),
        ({"sync_every": 0}, "sync_every must be at least 1. Got 0"),
        ({"update_scale": "big"}, "update_scale must be one of rms, energy"),
        ({"perturb_scope": "row"}, "perturb_scope must be one of global, tensor"),
        ({"newton_schulz": "cubic"}, "newton_schulz must be one of"),
        ({"aga_beta": 1.0}, r"aga_beta must be in \[0, 1\)"),
        ({"ns_steps": 0}, "ns_steps must be at least 1"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        ARS2Neo([nn.Parameter(torch.ones(2, 2))], **options)


def test_bad_groups_and_parameters_are_named():
    good = nn.Parameter(torch.ones(2, 2))
    with pytest.raises(ValueError, match="lr must be at least 0. Got -2"):
        ARS2Neo([{"params": [good], "lr": -2}])
    with pytest.raises(ValueError, match="complex parameters are not supported"):
        ARS2Neo([nn.Parameter(torch.ones(2, dtype=torch.complex64))])
    with pytest.raises(ValueError, match=r"Got shape \(2, 2, 3, 3\)"):
        ARS2Neo([nn.Parameter(torch.ones(2, 2, 3, 3))], orthogonal=True)
    good.grad = torch.ones(2, 2).to_sparse()
    with pytest.raises(ValueError, match="sparse gradients are not supported"):
        ARS2Neo([good]).step()


def test_param_groups_go_by_what_a_module_is():
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(5, 4)
            self.inner = nn.Linear(4, 4)
            self.experts = nn.Parameter(torch.ones(3, 4, 4))
            self.norm = nn.LayerNorm(4)
            self.head = nn.Linear(4, 5, bias=False)
            self.head.weight = self.embed.weight
            self.frozen = nn.Parameter(torch.ones(2, 2), requires_grad=False)

        def get_output_embeddings(self) -> nn.Module:
            return self.head

    model = Head()
    matrices, rest = param_groups(model, lr=0.1, adam_lr=0.01)
    assert matrices["orthogonal"] and matrices["lr"] == 0.1
    assert {id(p) for p in matrices["params"]} == {id(model.inner.weight), id(model.experts)}
    assert not rest["orthogonal"] and rest["lr"] == 0.01
    every = matrices["params"] + rest["params"]
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    assert {id(p) for p in every} == trained and len(every) == len(trained)
    with pytest.raises(ValueError, match="weight of Conv2d .* flatten=True makes it a matrix"):
        param_groups(nn.Conv2d(2, 2, 3))
    conv = nn.Conv2d(2, 2, 3)
    conv.optim_track = "adamw"
    assert [group["orthogonal"] for group in param_groups(conv)] == [False]


def assert_same(a, b) -> None:
    """Equality bit for bit of nested states."""
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b


def test_an_expert_that_is_no_longer_chosen_stays_finite():
    """Its moments fade until their squares are no numbers any more, its update before them."""
    torch.manual_seed(0)
    stack = nn.Parameter(torch.randn(2, 4, 6))
    optimizer = ARS2Neo([stack], lr=1e-2, betas=(0.9, 0.95))
    for step in range(1500):
        stack.grad = torch.randn_like(stack)
        if step > 10:
            stack.grad[0] = 0
        optimizer.step()
    assert stack.isfinite().all()
