"""The running monitor: every figure by hand, and what it must not do."""

from __future__ import annotations

import math
import time

import pytest
import torch
from torch import Tensor

from tiny_onn.shaping import RoutingMonitor, routing_statistics
from tiny_onn.shaping.information import jensen_shannon_distance, mutual_information

SURE = 200.0
KEYS = {
    "routing_entropy",
    "load_entropy",
    "dead_experts",
    "top_share",
    "consistency",
    "mutual_information",
    "jitter",
}


def one_hot(experts: list[int], num_experts: int) -> Tensor:
    """Logits of tokens that are sure of their expert."""
    return SURE * torch.eye(num_experts)[experts]


def state(monitor: RoutingMonitor) -> dict[str, Tensor]:
    return {k: v for k, v in monitor.state_dict().items() if isinstance(v, Tensor)}


def stored(monitor: RoutingMonitor) -> int:
    return sum(tensor.numel() for tensor in state(monitor).values())


def random_batch(seed: int, tokens: int = 60) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    made = torch.Generator().manual_seed(seed)
    logits = [torch.randn(tokens, 4, generator=made) for _ in range(3)]
    mask = torch.rand(tokens, generator=made) > 0.2
    groups, views = (torch.randint(n, (tokens,), generator=made) for n in (5, 2))
    return logits, mask, groups, views


def test_distance_by_hand() -> None:
    p = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.5, 0.5], [0.3, 0.7]])
    q = torch.tensor([[0.0, 1.0], [0.5, 0.5], [0.5, 0.5], [0.3, 0.7]])
    # JS((1, 0), (1/2, 1/2)) = H(3/4, 1/4) - (0 + 1) / 2.
    half = math.sqrt(0.75 * math.log2(4 / 3) + 0.25 * 2 - 0.5)
    assert jensen_shannon_distance(p, q).tolist() == pytest.approx([1, half, 0, 0], abs=1e-6)
    assert jensen_shannon_distance(q, p).tolist() == pytest.approx([1, half, 0, 0], abs=1e-6)
    # Close ones: sqrt(sum d^2 / (8 m ln 2)), where d = p - q, far below the square root of eps.
    near = torch.tensor([0.5 + 1e-5, 0.5 - 1e-5]), torch.tensor([0.5, 0.5])
    close = math.sqrt(2 * 1e-10 / (8 * 0.5 * math.log(2)))
    assert float(jensen_shannon_distance(*near)) == pytest.approx(close, rel=0.02)


def test_distance_agrees_with_scipy() -> None:
    distance = pytest.importorskip("scipy.spatial.distance")
    p, q = (torch.randn(8, 5).mul(3).softmax(-1) for _ in range(2))
    expected = distance.jensenshannon(p.numpy(), q.numpy(), base=2, axis=1)
    assert jensen_shannon_distance(p, q).numpy() == pytest.approx(expected, rel=1e-4)


def test_information_by_hand() -> None:
    told = torch.eye(4) * 25
    assert float(mutual_information(told)) == pytest.approx(2.0, abs=1e-12)
    assert float(mutual_information(torch.full((4, 8), 100))) == pytest.approx(0.0, abs=1e-3)
    # Two groups that share the second of three experts: H(E) - H(E|G) = 1.5 - 1.
    shared = torch.tensor([[1, 1, 0], [0, 1, 1]]) * 10_000
    assert float(mutual_information(shared)) == pytest.approx(0.5, abs=1e-3)
    # A group or an expert that never came up changes nothing.
    wider = torch.zeros(5, 6)
    wider[1:3, 2:5] = shared
    assert float(mutual_information(wider)) == pytest.approx(float(mutual_information(shared)))
    assert mutual_information(torch.zeros(2, 3, 4)).isnan().all()


def test_the_bias_of_information_is_taken_away() -> None:
    G, E, n = 20, 16, 2000
    made = torch.Generator().manual_seed(0)
    cells = torch.randint(G * E, (50, n), generator=made)
    counts = torch.stack([torch.bincount(row, minlength=G * E).view(G, E) for row in cells])
    joint = counts / n
    plain = -(torch.special.entr(joint).sum((-1, -2)) - 0.0)
    plain += torch.special.entr(joint.sum(-1)).sum(-1) + torch.special.entr(joint.sum(-2)).sum(-1)
    bias = (G - 1) * (E - 1) / (2 * n * math.log(2))
    assert float(plain.mean()) / math.log(2) == pytest.approx(bias, rel=0.1)  # 0.103 bits
    assert float(mutual_information(counts).mean()) < 0.05 * bias


def test_entropies_and_load_by_hand() -> None:
    monitor = RoutingMonitor(1)
    even, sure = torch.zeros(2, 4), one_hot([0, 1], 4)
    even[:, 0] += 1e-6
    monitor.update([even])
    assert monitor.summary()["routing_entropy"] == pytest.approx(1.0)
    monitor.update([sure])
    found = monitor.summary()
    assert found["routing_entropy"] == pytest.approx(0.5)
    load = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) / math.log(4)
    assert found["load_entropy"] == pytest.approx(load)
    assert (found["dead_experts"], found["top_share"]) == pytest.approx((0.5, 0.75))
    assert monitor.load.tolist() == [[0.75, 0.25, 0.0, 0.0]]
    assert found.keys() == KEYS - {"consistency", "mutual_information", "jitter"}


def test_a_batch_gives_what_the_statistics_of_a_batch_give() -> None:
    logits, mask, *_ = random_batch(0)
    monitor = RoutingMonitor(2)
    monitor.update(logits, mask)
    assert monitor.summary() == pytest.approx(routing_statistics(logits, 2, mask)._asdict())


@pytest.mark.parametrize("cut", [7, 30])
def test_two_updates_are_one_of_both(cut: int) -> None:
    logits, mask, groups, views = random_batch(1)
    whole, halves = (RoutingMonitor(2, 5) for _ in range(2))
    whole.update(logits, mask, groups, views)
    for part in (slice(cut), slice(cut, None)):
        halves.update([x[part] for x in logits], mask[part], groups[part], views[part])
    found, expected = halves.summary(), whole.summary()
    assert found.pop("consistency") != expected.pop("consistency")  # its parts are an update's
    assert found == pytest.approx(expected)
    assert torch.equal(halves.load_by_group, whole.load_by_group)


def test_an_expert_for_each_task_tells_the_task() -> None:
    tasks = torch.arange(8).repeat(50)
    monitor = RoutingMonitor(1, 8)
    monitor.update([one_hot(tasks.tolist(), 8), one_hot((tasks // 2).tolist(), 8)], groups=tasks)
    assert monitor.summary()["mutual_information"] == pytest.approx((3 + 2) / 2)
    assert torch.equal(monitor.load_by_group[0], torch.eye(8))


def test_independent_routes_tell_nothing() -> None:
    made = torch.Generator().manual_seed(0)
    monitor = RoutingMonitor(2, 8)
    for _ in range(20):
        groups = torch.randint(8, (200,), generator=made)
        monitor.update([torch.randn(200, 16, generator=made)], groups=groups)
    # 8000 routes; uncorrected it would be 0.0095 bits.
    assert 0 <= monitor.summary()["mutual_information"] < 0.003


def test_consistency_of_views_by_hand() -> None:
    # Task 0: view 0 goes to expert 0, view 1 to expert 1; its mean is (1/2, 1/2, 0, 0). Task 1
    # sends all its views to expert 2. Task 2 has one view, which says nothing.
    groups = torch.tensor([[0, 0, 0, 0, 1, 1, 1], [2, 2, 2, 2, 2, 2, 2]])
    views = torch.tensor([[0, 1, 0, 1, 0, 1, 7], [3, 3, 3, 3, 3, 3, 3]])
    logits = one_hot([0, 1, 0, 1, 2, 2, 2] + [3] * 7, 4)
    half = math.sqrt(0.75 * math.log2(4 / 3) + 0.25 * 2 - 0.5)
    monitor = RoutingMonitor(1, 3)
    monitor.update([logits], groups=groups, views=views)
    assert monitor.summary()["consistency"] == pytest.approx(2 * half / 5, abs=1e-5)
    # The numbers of the views, and the order of the tokens, mean nothing.
    order = torch.randperm(14)
    other = RoutingMonitor(1, 3)
    renamed = views.flatten()[order] * 1000 - 3
    other.update([logits[order]], groups=groups.flatten()[order], views=renamed)
    assert other.summary() == pytest.approx(monitor.summary(), abs=1e-6)


def test_consistency_without_views_is_that_of_the_updates() -> None:
    monitor = RoutingMonitor(1, 2)
    groups = torch.tensor([0, 0, 1, 1])
    monitor.update([one_hot([0, 0, 2, 2], 4)], groups=groups)
    assert "consistency" not in monitor.summary()
    monitor.update([one_hot([1, 1, 2, 2], 4)], groups=groups)
    half = math.sqrt(0.75 * math.log2(4 / 3) + 0.25 * 2 - 0.5)
    assert monitor.summary()["consistency"] == pytest.approx((half + 0) / 2, abs=1e-5)


def test_jitter_by_hand() -> None:
    monitor = RoutingMonitor(1)
    first = [one_hot([0, 1, 2, 3], 4), torch.zeros(4, 4)]
    monitor.probe(first)
    assert monitor.summary() == {}
    monitor.probe(first)
    assert monitor.summary() == {"jitter": 0.0}
    # At one of two sites, one of four tokens goes elsewhere; of the three that count, one does.
    moved = [one_hot([0, 1, 2, 0], 4), first[1]]
    monitor.probe(moved)
    assert monitor.summary()["jitter"] == pytest.approx(1 / 8)
    monitor.probe(first, torch.tensor([True, True, False, True]))
    assert monitor.summary()["jitter"] == pytest.approx(1 / 6)
    with pytest.raises(ValueError, match=r"the same batch every time, \(2, 4, 4\)"):
        monitor.probe([logits[:3] for logits in first])
    # A reset forgets the figure, not what the next probe is compared with.
    monitor.reset()
    assert monitor.summary() == {}
    monitor.probe(moved)
    assert monitor.summary()["jitter"] == pytest.approx(1 / 8)


def test_padding_does_not_count() -> None:
    logits, mask, groups, views = random_batch(2)
    cut, padded = (RoutingMonitor(2, 5) for _ in range(2))
    for seed in (2, 3):
        logits, mask, groups, views = random_batch(seed)
        cut.update([x[mask] for x in logits], None, groups[mask], views[mask])
        logits[1][~mask] = math.nan  # whatever stands there
        groups[~mask] = 1_000_000
        padded.update(logits, mask.view(6, 10), groups.view(6, 10), views.view(6, 10))
    assert padded.summary() == pytest.approx(cut.summary())
    assert torch.equal(padded.load_by_group, cut.load_by_group)
    nothing = RoutingMonitor(2, 5)
    nothing.update(logits, torch.zeros(60), groups, views)
    assert nothing.summary() == {} and nothing.load.sum() == 0


def test_a_token_that_is_not_finite_does_not_count_and_an_expert_may_be_barred() -> None:
    logits, _, groups, _ = random_batch(4)
    spoilt, clean = (RoutingMonitor(2, 5) for _ in range(2))
    rest = torch.arange(60) != 7
    clean.update([x[rest] for x in logits], groups=groups[rest])
    logits[2][7, 1] = math.nan
    spoilt.update(logits, groups=groups)
    assert spoilt.summary() == pytest.approx(clean.summary())
    barred = torch.zeros(5, 4)
    barred[:, 3] = -math.inf
    monitor = RoutingMonitor(1)
    monitor.update([barred])
    assert monitor.summary()["routing_entropy"] == pytest.approx(math.log(3) / math.log(4))


def test_tokens_without_a_group_count_in_the_load_alone() -> None:
    monitor = RoutingMonitor(1, 2)
    monitor.update([one_hot([0, 1, 2], 3)], groups=torch.tensor([0, 1, -1]))
    monitor.update([one_hot([2], 3)])
    assert monitor.load.tolist() == [[0.25, 0.25, 0.5]]
    assert monitor.load_by_group.tolist() == [[[1, 0, 0], [0, 1, 0]]]


def test_sites_of_different_sizes() -> None:
    monitor = RoutingMonitor([1, 2])
    small, large = torch.zeros(4, 2), one_hot([0, 1, 2, 3], 4)
    small[:, 0], large[:, 0] = 1e-6, large[:, 0] + SURE / 2
    monitor.update([small, large])
    assert monitor.load[0].tolist() == [1, 0, 0, 0]
    assert monitor.load[1].sum() == 1 and monitor.load[1, 0] == 0.5
    found = monitor.summary()
    assert found["dead_experts"] == pytest.approx(1 / 4)
    assert found["routing_entropy"] == pytest.approx(0.5)


def test_a_bias_counts_in_the_choice() -> None:
    monitor = RoutingMonitor(1)
    logits = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    monitor.update([logits, logits], biases=[torch.tensor([0.0, 2.0]), None])
    assert monitor.load.tolist() == [[0, 1], [1, 0]]


def test_the_window_forgets_what_is_old() -> None:
    monitor = RoutingMonitor(1, window=2)
    top = []
    for expert in (0, 0, 1, 1, 1, 1, 1):
        monitor.update([one_hot([expert], 2)])
        top.append(monitor.load[0, 0].item())
    assert top == pytest.approx([1, 1, 2 / 3, 1 / 2, 0, 0, 0])


def test_memory_does_not_grow() -> None:
    monitor, sizes = RoutingMonitor(2, 5, window=10), []
    for step in range(200):
        logits, mask, groups, views = random_batch(step)
        monitor.update(logits, mask, groups, views + 2 * step)
        if step % 20 == 19:
            monitor.probe(random_batch(0)[0])
        sizes.append(stored(monitor))
    held = 2 * (3 * 6 * 4 * 2 + 6 + 3 + 3 + 1 + 1) + 3 * 60 * 4 + 1
    assert sizes[39:] == [held] * 161
    assert monitor.summary().keys() == KEYS


def test_nothing_joins_the_graph() -> None:
    logits, mask, groups, views = random_batch(5)
    for x in logits:
        x.requires_grad_()
    monitor = RoutingMonitor(2, 5)
    monitor.update(logits, mask, groups, views)
    monitor.probe(logits, mask)
    assert not any(x.requires_grad for x in state(monitor).values())
    assert not monitor.load.requires_grad
    assert all(type(value) is float for value in monitor.summary().values())
    assert all(x.grad is None and x._version == 0 for x in logits)


def test_update_reads_nothing_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the meta device there is nothing to read: any look at a value raises."""
    logits, mask, groups, views = random_batch(5)
    monitor = RoutingMonitor([1, 2, 2], 5)
    meta = torch.device("meta")
    for _ in range(2):
        on_meta = [x.to(meta) for x in (mask, groups, views)]
        monitor.update([x.to(meta) for x in logits], *on_meta)
        monitor.probe([x.to(meta) for x in logits], mask.to(meta))
    assert {tensor.device for tensor in state(monitor).values()} == {meta}


def test_a_state_goes_on_as_if_nothing_had_happened() -> None:
    whole, second = (RoutingMonitor(2, 5, window=3) for _ in range(2))
    for step in range(10):
        if step == 5:
            second.load_state_dict(whole.state_dict())
        for monitor in (whole, second) if step >= 5 else (whole,):
            logits, *rest = random_batch(step)
            monitor.update(logits, *rest)
            monitor.probe([x + 0.1 * step for x in random_batch(0)[0]])
    assert second.summary() == whole.summary()
    assert second.summary().keys() == KEYS
    # A state is a copy: what goes on doesn't change it.
    before = whole.state_dict()
    kept = before["now.routes"].clone()
    whole.update(*random_batch(0))
    assert torch.equal(before["now.routes"], kept)
    with pytest.raises(ValueError, match="of 5 groups, expected 6"):
        RoutingMonitor(2, 6).load_state_dict(before)


def test_a_reset_monitor_is_as_new() -> None:
    logits, mask, groups, views = random_batch(6)
    monitor, fresh = (RoutingMonitor(2, 5) for _ in range(2))
    monitor.update(*random_batch(7))
    monitor.reset()
    for each in (monitor, fresh):
        each.update(logits, mask, groups, views)
    assert monitor.summary() == fresh.summary()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mask": torch.ones(9)}, "mask must have 60 entries"),
        ({"groups": torch.zeros(9)}, "groups must have 60 entries"),
        ({"groups": torch.full((60,), 5)}, r"groups must be below 5\. Got 5"),
        ({"views": torch.zeros(60)}, "views must come with groups"),
        ({"biases": [None]}, "biases of 3 sites. Got 1"),
        ({"router_logits": []}, "Expected logits of some experts"),
        ({"router_logits": [torch.zeros(60, 4), torch.zeros(9, 4)]}, "the same tokens"),
        ({"router_logits": [torch.zeros(60, 1)]}, "more than 1 experts"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, Tensor], message: str) -> None:
    given = {"router_logits": random_batch(0)[0]} | change
    with pytest.raises(ValueError, match=message):
        RoutingMonitor(2, 5).update(**given)


def test_settings_out_of_bounds_are_named() -> None:
    for settings in ((0,), ([2, 0],), (1, -1)):
        with pytest.raises(ValueError, match="must be at least"):
            RoutingMonitor(*settings)
    with pytest.raises(ValueError, match="num_groups=G"):
        RoutingMonitor(1).update([torch.zeros(3, 2)], groups=torch.zeros(3))
    monitor = RoutingMonitor(1)
    with pytest.raises(ValueError, match="no routes yet"):
        monitor.load  # noqa: B018
    monitor.update([torch.zeros(3, 2)])
    with pytest.raises(ValueError, match=r"Expected logits of \[2\]"):
        monitor.update([torch.zeros(3, 2)] * 2)


def test_an_update_is_cheap(capsys: pytest.CaptureFixture[str]) -> None:
    logits = [torch.randn(2048, 16) for _ in range(8)]
    groups, views = (torch.randint(n, (128,)).repeat_interleave(16) for n in (40, 8))
    monitor, times = RoutingMonitor(2, 40), []
    for _ in range(10):
        start = time.perf_counter()
        monitor.update(logits, groups >= 0, groups, views)
        times.append(time.perf_counter() - start)
    best = 1000 * min(times)
    with capsys.disabled():
        print(f"\nupdate of 8 sites x [2048, 16]: {best:.1f} ms, one in {monitor.interval} steps")
    # A training step of so many tokens and sites takes well over 100 ms on such a machine.
    assert best < 60
