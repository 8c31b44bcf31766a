"""ARS2-Neo: Adam's second moment for the step's length, Muon's orthogonalisation for its
direction, and a sharpness-aware pass run only when the geometry asks for it.

For a matrix W with gradient g, in every step:

    m <- b1 m + (1 - b1) g          v <- b2 v + (1 - b2) g²
    u  = m̂ / (sqrt(v̂) + eps)                      Adam's direction
    W <- (1 - lr wd) W - lr s(u) NS(u)             its energy, on an orthogonal matrix

A stack of matrices ``[E, m, n]`` is E matrices. Everything that is not a matrix takes AdamW.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from tiny_onn.optim.newton_schulz import Method, orthogonalize
from tiny_onn.optim.random_state import RandomState
from tiny_onn.optim.sam import (
    Alignment,
    FirstPass,
    Perturbation,
    add_shear,
    cosine,
    norms,
    sharpest_directions,
)
from tiny_onn.optim.sharding import Group, Layout, check_layout, local, total_of
from tiny_onn.optim.updates import LastUpdate, adam_directions, orthogonal_updates
from tiny_onn.optim.validation import (
    check_arguments,
    check_group,
    check_parameter,
    is_orthogonal,
    local_gradients,
)

Closure = Callable[[], Any]

_SETTINGS = ("sam", "rho", "perturb_scope", "alpha", "gamma", "trigger", "process_group")
_ITERATION = ("newton_schulz", "ns_steps", "ns_dtype")
_OWN = (*_SETTINGS, *_ITERATION, "_alignment", "_updates", "_alpha", "_last", "_halfway", "_first")


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
        flatten: default of the groups' ``flatten``: convolution kernels ``[out, in, ...]`` of an
            orthogonal group are matrices ``[out, in * ...]``.
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
        trigger: decides in place of that rule: takes the :class:`Alignment` with the newest
            ``phi`` and returns whether a second pass is due, in every process the same.
        process_group: processes that hold the same parameters and gradients, as those of
            DistributedDataParallel do; they share out the orthogonalisation. Parameters that
            ``fully_shard`` has spread need none.

    State per parameter: ``exp_avg``, ``exp_avg_sq``, ``step``, and ``shear`` in the modes that
    keep one, all made at construction.

    Raises:
        ValueError: for an argument out of range, or a parameter that is complex, sparse, or has
            more than three dimensions in an orthogonal group without ``flatten``, or is spread by
            tensor parallelism.
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
        flatten: bool = False,
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
        trigger: Callable[[Alignment], bool] | None = None,
        process_group: Group = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "orthogonal": orthogonal,
            "flatten": flatten,
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
        self.trigger = trigger
        self.process_group = process_group
        self._alignment = Alignment(aga_beta, aga_lambda, 1 if sam == "sync" else sync_every)
        self._updates: dict[Tensor, int] = {}
        self._alpha = 0.0
        self._last = LastUpdate()
        self._halfway = False
        self._first: FirstPass | None = None
        check_arguments(self, sync_every, aga_beta, aga_lambda)
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its state is made at once."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        check_group(group)
        group["aga"] = self._alignment.state_dict()
        for p in group["params"]:
            check_parameter(p, group)
            check_layout(p)
            self._make_state(p)

    def _make_state(self, p: Tensor) -> None:
        """The state of a parameter: what it has is kept, what is missing begins at zero."""
        state = self.state[p]
        state["step"] = torch.as_tensor(state.get("step", 0.0), dtype=torch.float32, device="cpu")
        self._updates[p] = int(state["step"])
        for name in ("exp_avg", "exp_avg_sq", *(["shear"] if self._keeps_shear else [])):
            if name not in state:
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
                ``sam="off"`` or a :meth:`first_step` before.

        Returns:
            What the closure returned at the unperturbed parameters, or None.

        Raises:
            ValueError: without a closure while second passes are on.
        """
        if closure is None:
            # torch.distributed.checkpoint makes the state exist by a step of zero length.
            waits = self.sam != "off" and not self._halfway
            if waits and any(float(group["lr"]) for group in self.param_groups):
                raise ValueError(
                    f"step() needs a closure when sam={self.sam!r}, because it may have to run "
                    "twice; use first_step() and second_step() where there is none"
                )
            self.second_step()
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
        this, run a second pass if it returns True, and then call :meth:`second_step`, or
        ``scaler.step(optimizer)``. Gradients that are not finite perturb nothing, so that a
        scaler may skip the step.

        Raises:
            RuntimeError: if a step with finite gradients is still waiting for its second half.
        """
        if self._first is not None and bool(self._first.is_finite):
            raise RuntimeError("first_step() was called twice without a second_step()")
        self._abandon()
        self._halfway = self.sam != "off"
        parameters = [p for p in self._parameters() if p.grad is not None]
        if self.sam == "off" or not parameters:
            return False
        gradients = local_gradients(parameters)
        if not self._second_pass_is_due(parameters, gradients):
            self._add_shear(parameters, gradients)
            return False
        gradients = [g.clone() for g in gradients]
        directions = self._sharpest(parameters, gradients)
        total = total_of(parameters)
        move = Perturbation(
            list(map(local, parameters)), directions, self.rho, self.perturb_scope, total
        )
        self._first = FirstPass(parameters, gradients, move, total)
        return True

    @torch.no_grad()
    def second_step(self) -> None:
        """After the last backward pass: restore the parameters, then update them."""
        first, self._first = self._first, None
        if first is not None:
            first.move.restore()
            first.settle(self._kept("shear", first.parameters) if self._keeps_shear else None)
        self._update()
        if self._halfway:
            self._alignment.advance(first is not None)
            for group in self.param_groups:
                group["aga"] = self._alignment.state_dict()
        self._halfway = False

    def _abandon(self) -> None:
        """Give up a step between its passes; nothing but the gradients has changed."""
        if self._first is not None:
            self._first.move.restore()
        self._first, self._halfway = None, False

    # Sharpness: where to look, and whether to look again.

    def _sharpest(self, parameters: list[Tensor], gradients: list[Tensor]) -> list[Tensor]:
        group_of = {p: group for group in self.param_groups for p in group["params"]}
        return sharpest_directions(
            list(map(local, parameters)),
            gradients,
            self._kept("exp_avg_sq", parameters),
            [self._updates[p] + 1 for p in parameters],
            [group_of[p]["betas"][1] for p in parameters],
            [group_of[p]["eps"] for p in parameters],
        )

    def _second_pass_is_due(self, parameters: list[Tensor], gradients: list[Tensor]) -> bool:
        if self._alignment.due or self.sam != "adaptive":
            return self._alignment.due
        phi = cosine(gradients, self._kept("shear", parameters), total_of(parameters))
        if self.process_group is not None:
            torch.distributed.broadcast(phi, group=self.process_group, group_src=0)
        # The only host read of a step: the decision to run a second pass is the host's.
        turned = self._alignment.observe(float(phi))
        return turned if self.trigger is None else self.trigger(self._alignment)

    def _add_shear(self, parameters: list[Tensor], gradients: list[Tensor]) -> None:
        shear, total = self._kept("shear", parameters), total_of(parameters)
        phi = self._alignment.phi if self.sam == "adaptive" else 0.0
        self._alpha = self.alpha * (1 + max(0.0, phi)) ** self.gamma
        add_shear(gradients, shear, self._alpha, total)

    # The update.

    def _update(self) -> None:
        self._last = LastUpdate()
        for group in self.param_groups:
            self._last.start_group()
            tracks: dict[bool, list[Tensor]] = {True: [], False: []}
            for p in group["params"]:
                if p.grad is not None:
                    tracks[is_orthogonal(p, group)].append(p)
            for orthogonal, parameters in tracks.items():
                if parameters:
                    self._update_track(parameters, group, orthogonal)

    def _update_track(
        self, parameters: list[Tensor], group: dict[str, Any], orthogonal: bool
    ) -> None:
        lr, weight_decay = group["lr"], group["weight_decay"]
        torch._foreach_add_([self.state[p]["step"] for p in parameters], 1)
        for p in parameters:
            self._updates[p] += 1
        gradients, total = local_gradients(parameters), total_of(parameters)
        directions = adam_directions(
            gradients,
            self._kept("exp_avg", parameters),
            self._kept("exp_avg_sq", parameters),
            [self._updates[p] for p in parameters],
            group["betas"],
            group["eps"],
        )
        if orthogonal:
            directions = self._orthogonalized(parameters, directions, group)
        self._last.note(parameters, norms(gradients, total), norms(directions, total))
        weights = list(map(local, parameters))
        torch._foreach_mul_(weights, 1 - lr * weight_decay)
        if isinstance(lr, Tensor):
            torch._foreach_mul_(directions, lr.to(directions[0].device))
            torch._foreach_sub_(weights, directions)
        else:
            torch._foreach_add_(weights, directions, alpha=-lr)

    def _orthogonalized(
        self, parameters: list[Tensor], directions: list[Tensor], group: dict[str, Any]
    ) -> list[Tensor]:
        """``s(u) NS(u)`` of the matrices of one group."""
        layouts = [Layout(p, self.process_group) for p in parameters]
        updates = orthogonal_updates(
            [layout.whole(u) for layout, u in zip(layouts, directions, strict=True)],
            [layout.helpers for layout in layouts],
            self._newton_schulz,
            group["update_scale"],
            group["flatten"],
        )
        return [layout.part(u) for layout, u in zip(layouts, updates, strict=True)]

    def _newton_schulz(self, u: Tensor) -> Tensor:
        method, steps, dtype = self.newton_schulz, self.ns_steps, self.ns_dtype
        return orthogonalize(u, method=method, steps=steps, dtype=dtype)

    # What others read.

    def second_moment(self, p: Tensor) -> Tensor:
        """``exp_avg_sq`` of a parameter, to be read only; zeros before its first update."""
        return self.state[p]["exp_avg_sq"]

    def updates(self, p: Tensor) -> int:
        """How many updates a parameter has had; no device is asked."""
        return self._updates[p]

    @property
    def diagnostics(self) -> dict[str, Any]:
        """What the last step looked like; only reading it waits for the device.

        ``phi, sigma, threshold, alpha, sync_rate, syncs`` of the sharpness-aware schedule;
        ``grad_norm`` of the gradients the update used, and ``update_rms``, the root mean square
        of each group's update before its learning rate.
        """
        a = self._alignment
        return {
            "phi": a.phi,
            "sigma": a.sigma,
            "threshold": -a.threshold * a.sigma,
            "alpha": self._alpha,
            "sync_rate": a.syncs / a.steps if a.steps else 0.0,
            "syncs": a.syncs,
            "grad_norm": self._last.grad_norm(),
            "update_rms": self._last.update_rms(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a ``state_dict()``, bit for bit; the schedule of the second passes is every
        group's ``aga``. A state of another mode serves, too."""
        # torch would share the tensors with the state that is loaded.
        super().load_state_dict(copy.deepcopy(state_dict))
        for p in self._parameters():
            self._make_state(p)
        self._alignment.load_state_dict(self.param_groups[0].get("aga", {}))

    def __getstate__(self) -> dict[str, Any]:
        # torch's own leaves out what a subclass adds, and so would deepcopy and pickle.
        return super().__getstate__() | {name: vars(self)[name] for name in _OWN}

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _kept(self, name: str, parameters: list[Tensor]) -> list[Tensor]:
        """The parts of a state that lie in this process."""
        return [local(self.state[p][name]) for p in parameters]
