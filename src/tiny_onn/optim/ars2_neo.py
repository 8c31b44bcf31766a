"""ARS2-Neo: Adam's second moment for the step's length, Muon's orthogonalisation for its
direction, and a sharpness-aware pass run only when the geometry asks for it.

For a matrix W with gradient g, in every step:

    m <- b1 m + (1 - b1) g          v <- b2 v + (1 - b2) g²
    u  = m̂ / (sqrt(v̂) + eps)                      Adam's direction
    W <- (1 - lr wd) W - lr s(u) NS(u)             its energy, on an orthogonal matrix

A stack of matrices ``[E, m, n]`` is E matrices. Everything that is not a matrix takes AdamW.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from tiny_onn.optim.newton_schulz import Method, auto_dtype, orthogonalize
from tiny_onn.optim.random_state import RandomState
from tiny_onn.optim.sam import TINY, Alignment, Perturbation, dot, norm, shear_force
from tiny_onn.optim.validation import (
    check_arguments,
    check_gradient,
    check_group,
    check_parameter,
    gradients_of,
    is_orthogonal,
)

Closure = Callable[[], Any]

_SETTINGS = ("sam", "rho", "perturb_scope", "alpha", "gamma")
_ITERATION = ("newton_schulz", "ns_steps", "ns_dtype")
_OWN = (*_SETTINGS, *_ITERATION, "_alignment", "_figures", "_first")


class ARS2Neo(Optimizer):
    """Orthogonalised, energy-scaled Adam with sharpness-aware passes.

    Args:
        params: parameters, or groups; ``param_groups(model)`` makes the groups of a model. In a
            group ``orthogonal`` says which track it takes; where it is None every parameter of
            two or three dimensions is orthogonalised and the others take AdamW.
        lr: learning rate, a number or a tensor; with ``update_scale="rms"`` AdamW's carry over.
        betas: decay of the first and second moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled weight decay.
        orthogonal: default of the groups' ``orthogonal``.
        update_scale: ``"rms"`` scales the orthogonal factor by ``|u|_F / sqrt(min(m, n))``, which
            gives the update Adam's root mean square; ``"energy"`` by ``|u|_F``.
        newton_schulz, ns_steps, ns_dtype: see :func:`tiny_onn.optim.orthogonalize`.
        sam: when the second pass runs: ``"off"``; ``"sync"``, at every step; ``"delayed"``, every
            ``sync_every`` steps; ``"adaptive"``, when the gradient turns against the shear force
            (AGA), and at the latest after ``sync_every`` steps.
        rho: radius of the perturbation.
        perturb_scope: ``"global"``, one radius over all parameters, or ``"tensor"``, one each.
        alpha, gamma: the shear force of the last second pass is added to the gradients between
            with weight ``alpha (1 + max(0, phi)) ** gamma``, as long as the gradient.
        aga_beta, aga_lambda: a second pass is due when ``phi < -aga_lambda * sigma``, with sigma²
            the running mean of phi² of decay ``aga_beta``.

    State per parameter: ``exp_avg``, ``exp_avg_sq``, ``step``, and ``shear`` in the modes that
    keep one, all made at construction.

    Raises:
        ValueError: for an argument out of range, or a parameter that is complex, sparse, or has
            more than three dimensions in an orthogonal group.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        *,
        orthogonal: bool | None = None,
        update_scale: str = "rms",
        newton_schulz: Method = "quintic",
        ns_steps: int = 5,
        ns_dtype: torch.dtype | str | None = None,
        sam: str = "off",
        rho: float = 0.05,
        perturb_scope: str = "global",
        sync_every: int = 10,
        alpha: float = 0.5,
        gamma: float = 1.0,
        aga_beta: float = 0.9,
        aga_lambda: float = 1.0,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "orthogonal": orthogonal,
            "update_scale": update_scale,
        }
        self.sam = sam
        self.rho = rho
        self.perturb_scope = perturb_scope
        self.alpha = alpha
        self.gamma = gamma
        self.newton_schulz = newton_schulz
        self.ns_steps = ns_steps
        self.ns_dtype = ns_dtype
        self._alignment = Alignment(aga_beta, aga_lambda, 1 if sam == "sync" else sync_every)
        self._figures: dict[str, Any] = {}
        self._first: _FirstPass | None = None
        check_arguments(self, sync_every, aga_beta, aga_lambda)
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its state is made at once."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        check_group(group)
        for p in group["params"]:
            check_parameter(p, group["orthogonal"])
            self._make_state(p)

    def _make_state(self, p: Tensor) -> None:
        state = self.state[p]
        state["step"] = torch.zeros((), dtype=torch.float32)
        for name in ("exp_avg", "exp_avg_sq", *(["shear"] if self._keeps_shear else [])):
            state[name] = torch.zeros_like(p, memory_format=torch.preserve_format)

    @property
    def _keeps_shear(self) -> bool:
        return self.sam in ("delayed", "adaptive")

    # The step: one pass or two, then the update.

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Any:
        """Update the parameters.

        Args:
            closure: zeroes the gradients, runs forward and backward, returns the loss. It is
                called once, or twice when a second pass is due, on the same batch and with the
                same random state. Without one the gradients are used as they are, which needs
                ``sam="off"``.

        Returns:
            What the closure returned at the unperturbed parameters, or None.

        Raises:
            ValueError: without a closure while second passes are on.
        """
        if closure is None:
            # torch.distributed.checkpoint makes the state exist by a step of zero length.
            if self.sam != "off" and any(float(group["lr"]) for group in self.param_groups):
                raise ValueError(
                    f"step() needs a closure when sam={self.sam!r}, because it may have to run "
                    "twice; use first_step() and second_step() where there is none"
                )
            self._update()
            return None
        random_state = RandomState(self._parameters()) if self.sam != "off" else None
        with torch.enable_grad():
            loss = closure()
        if self.first_step():
            assert random_state is not None
            random_state.restore()
            try:
                with torch.enable_grad():
                    closure()
            except BaseException:
                self._abandon()
                raise
        self.second_step()
        return loss

    @torch.no_grad()
    def first_step(self) -> bool:
        """After the first backward pass: perturb the parameters if a second pass is due.

        For loops that can't give a closure, such as those with a ``GradScaler``: unscale, call
        this, run a second pass if it returns True, and then call :meth:`second_step`.

        Raises:
            RuntimeError: if a first step is still waiting for its second.
        """
        if self._first is not None:
            raise RuntimeError("first_step() was called twice without a second_step()")
        parameters = [p for p in self._parameters() if p.grad is not None]
        if self.sam == "off" or not parameters:
            return False
        gradients = gradients_of(parameters)
        if not self._second_pass_is_due(parameters, gradients):
            self._add_shear(parameters, gradients)
            return False
        gradients = [g.clone() for g in gradients]
        directions = self._sharpest(parameters, gradients)
        move = Perturbation(parameters, directions, self.rho, self.perturb_scope)
        self._first = _FirstPass(move, gradients)
        return True

    @torch.no_grad()
    def second_step(self) -> None:
        """After the last backward pass: restore the parameters, then update them."""
        synced = self._first is not None
        if self._first is not None:
            first, self._first = self._first, None
            first.move.restore()
            self._take_adversarial_gradients(first)
        self._update()
        if self.sam != "off":
            self._alignment.advance(synced)

    def _abandon(self) -> None:
        """Give up a step between its passes; nothing but the gradients has changed."""
        if self._first is not None:
            self._first.move.restore()
            self._first = None

    # Sharpness: where to look, what was found, and whether to look again.

    def _sharpest(self, parameters: list[Tensor], gradients: list[Tensor]) -> list[Tensor]:
        """``|w| g / (sqrt(v') + eps)`` with the second moment as it would be after this step."""
        groups = {id(p): group for group in self.param_groups for p in group["params"]}
        directions = []
        for p, g in zip(parameters, gradients, strict=True):
            (_, beta2), eps = groups[id(p)]["betas"], groups[id(p)]["eps"]
            state = self.state[p]
            ahead = torch.lerp(state["exp_avg_sq"], g * g, 1 - beta2)
            root = (ahead / (1 - beta2 ** (state["step"].item() + 1))).sqrt_()
            directions.append(p.abs() * g / root.add_(eps))
        return directions

    def _second_pass_is_due(self, parameters: list[Tensor], gradients: list[Tensor]) -> bool:
        if self._alignment.due or self.sam != "adaptive":
            return self._alignment.due
        shear = [self.state[p]["shear"] for p in parameters]
        # The only host read of a step: the decision to run a second pass is the host's.
        return self._alignment.observe(float(_cosine(gradients, shear)))

    def _add_shear(self, parameters: list[Tensor], gradients: list[Tensor]) -> None:
        """``g <- g + alpha_t (|g| / |s|) s``, in place."""
        shear = [self.state[p]["shear"] for p in parameters]
        phi = self._alignment.phi if self.sam == "adaptive" else 0.0
        weight = self.alpha * (1 + max(0.0, phi)) ** self.gamma
        scale = weight * norm(gradients) / (norm(shear) + TINY)
        for g, s in zip(gradients, shear, strict=True):
            g.add_(s * scale.to(s.dtype))
        self._figures["alpha"] = weight

    def _take_adversarial_gradients(self, first: _FirstPass) -> None:
        """Give every parameter the gradient its update uses, and keep the shear force.

        A parameter that only one pass reached keeps the gradient of that pass, and a second pass
        that is not finite anywhere counts for nothing.
        """
        parameters, plain = first.move.parameters, first.gradients
        for p, g in zip(parameters, plain, strict=True):
            if p.grad is None:
                p.grad = g.clone()
        adversarial = gradients_of(parameters)
        finite = torch.isfinite(norm(adversarial))
        for a, g in zip(adversarial, plain, strict=True):
            a.copy_(torch.where(finite, a, g))
        if self._keeps_shear:
            for p, s in zip(parameters, shear_force(adversarial, plain), strict=True):
                self.state[p]["shear"].copy_(s)

    # The update.

    def _update(self) -> None:
        for group in self.param_groups:
            tracks: dict[bool, list[Tensor]] = {True: [], False: []}
            for p in group["params"]:
                if p.grad is not None:
                    check_gradient(p)
                    tracks[is_orthogonal(p, group)].append(p)
            for orthogonal, parameters in tracks.items():
                if parameters:
                    self._update_track(parameters, group, orthogonal)

    def _update_track(
        self, parameters: list[Tensor], group: dict[str, Any], orthogonal: bool
    ) -> None:
        lr, weight_decay = group["lr"], group["weight_decay"]
        directions = self._directions(parameters, group)
        if orthogonal:
            directions = self._orthogonalized(directions, group["update_scale"])
        torch._foreach_mul_(parameters, 1 - lr * weight_decay)
        if isinstance(lr, Tensor):
            torch._foreach_mul_(directions, lr.to(directions[0].device))
            torch._foreach_sub_(parameters, directions)
        else:
            torch._foreach_add_(parameters, directions, alpha=-lr)

    def _directions(self, parameters: list[Tensor], group: dict[str, Any]) -> list[Tensor]:
        """Adam's ``u = m̂ / (sqrt(v̂) + eps)``, after moving the moments on."""
        beta1, beta2 = group["betas"]
        gradients = gradients_of(parameters)
        states = [self.state[p] for p in parameters]
        m, v, steps = ([s[key] for s in states] for key in ("exp_avg", "exp_avg_sq", "step"))
        torch._foreach_add_(steps, 1)
        torch._foreach_lerp_(m, gradients, 1 - beta1)
        torch._foreach_mul_(v, beta2)
        torch._foreach_addcmul_(v, gradients, gradients, 1 - beta2)
        ages = [step.item() for step in steps]
        roots = torch._foreach_sqrt(v)
        torch._foreach_div_(roots, [math.sqrt(1 - beta2**age) for age in ages])
        torch._foreach_add_(roots, group["eps"])
        torch._foreach_mul_(roots, [1 - beta1**age for age in ages])
        return list(torch._foreach_div(m, roots))

    def _orthogonalized(self, directions: list[Tensor], update_scale: str) -> list[Tensor]:
        """``s(u) NS(u)`` of every matrix; matrices of one shape are computed together."""
        done: dict[int, Tensor] = {}
        for (rows, columns), members in _buckets(directions).items():
            u = torch.cat([directions[i].reshape(-1, rows, columns) for i in members])
            energy = torch.linalg.vector_norm(u, dim=(-2, -1), keepdim=True)
            if update_scale == "rms":
                energy = energy / math.sqrt(min(rows, columns))
            u = energy * orthogonalize(
                u, method=self.newton_schulz, steps=self.ns_steps, dtype=self._ns_dtype(u)
            )
            counts = [directions[i].numel() // (rows * columns) for i in members]
            for i, part in zip(members, u.split(counts), strict=True):
                done[i] = part.view(directions[i].shape)
        return [done[i] for i in range(len(directions))]

    def _ns_dtype(self, u: Tensor) -> torch.dtype | None:
        if self.ns_dtype == "auto":
            return None if u.dtype == torch.float64 else auto_dtype(u.device)
        assert self.ns_dtype is None or isinstance(self.ns_dtype, torch.dtype)
        return self.ns_dtype

    # What others read.

    def second_moment(self, p: Tensor) -> Tensor:
        """``exp_avg_sq`` of a parameter, to be read only; zeros before its first update."""
        return self.state[p]["exp_avg_sq"]

    def updates(self, p: Tensor) -> int:
        """How many updates a parameter has had; no device is asked."""
        return int(self.state[p]["step"])

    @property
    def diagnostics(self) -> dict[str, Any]:
        """``phi, sigma, threshold, alpha, sync_rate, syncs`` of the sharpness-aware schedule."""
        a = self._alignment
        return {
            "phi": a.phi,
            "sigma": a.sigma,
            "threshold": -a.threshold * a.sigma,
            "alpha": self._figures.get("alpha", 0.0),
            "sync_rate": a.syncs / a.steps if a.steps else 0.0,
            "syncs": a.syncs,
        }

    def state_dict(self) -> dict[str, Any]:
        """The state of :class:`torch.optim.Optimizer`, and the schedule of the second passes."""
        return super().state_dict() | {"alignment": self._alignment.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a state of :meth:`state_dict`, bit for bit."""
        super().load_state_dict(state_dict)
        for state in self.state.values():
            state["step"] = state["step"].to("cpu", torch.float32)
        if "alignment" in state_dict:
            self._alignment = Alignment(**state_dict["alignment"])

    def __getstate__(self) -> dict[str, Any]:
        # torch's own leaves out what a subclass adds, and so would deepcopy and pickle.
        own = {name: vars(self)[name] for name in _OWN}
        return super().__getstate__() | own

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]


class _FirstPass(NamedTuple):
    """What the second pass needs of the first."""

    move: Perturbation
    gradients: list[Tensor]


def _cosine(a: list[Tensor], b: list[Tensor]) -> Tensor:
    return dot(a, b) / (norm(a) * norm(b) + TINY)


def _buckets(matrices: list[Tensor]) -> dict[tuple[int, int], list[int]]:
    """Indices of the matrices by shape of the last two dimensions."""
    found: dict[tuple[int, int], list[int]] = {}
    for i, u in enumerate(matrices):
        found.setdefault((u.shape[-2], u.shape[-1]), []).append(i)
    return found
