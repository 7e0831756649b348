"""The storages of a step: sizes, categories, owners, and the peaks of torch's own tracker."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.profiler import record_function

from lowrank_lab.config import RunConfig
from lowrank_lab.memory.breakdown import CATEGORIES, NAMES, PARTS, Breakdown
from lowrank_lab.memory.tracker import Tracker
from lowrank_lab.methods.build import build
from lowrank_lab.methods.resolve import resolve
from lowrank_lab.training.step import take_step_


def traced(model, x, optimizer=None, steps=1, hidden=None):
    """One step of a small model, in the phases of a real one."""
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.1)
    tracker = Tracker(model, optimizer, hidden=hidden)
    traces = []
    for _ in range(steps):
        with tracker:
            with record_function("forward"):
                loss = model(x).sum()
            with record_function("backward"):
                loss.backward()
            with record_function("optimizer"):
                optimizer.step()
            optimizer.zero_grad()
            del loss
        traces.append(tracker.trace())
    tracker.close()
    return traces


def two_layers(dtype=torch.float32):
    layers = nn.Linear(5, 7, dtype=dtype), nn.ReLU(), nn.Linear(7, 3, dtype=dtype)
    return nn.Sequential(*layers)


PARAMETERS = 5 * 7 + 7 + 7 * 3 + 3


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_activations_are_what_the_backward_pass_waits_for(dtype, size):
    x = torch.randn(2, 5, dtype=dtype)
    (trace,) = traced(two_layers(dtype), x)
    # the output of ReLU is kept, its input is not; x itself was there before
    assert trace.kept.activations == size * (2 * 7) + size  # and the loss
    assert trace.kept.weights == size * PARAMETERS
    assert trace.kept.gradients == 0


def test_gradients_are_counted_from_their_making_to_zero_grad():
    (trace,) = traced(two_layers(), torch.randn(2, 5))
    gradients = trace.timeline()["gradients"]
    assert gradients.max() == 4 * PARAMETERS
    assert gradients[0] == gradients[-1] == 0


def test_states_of_the_first_step_are_states_from_their_first_moment():
    model = two_layers()
    first, second = traced(model, torch.randn(2, 5), torch.optim.Adam(model.parameters()), steps=2)
    states = 4 * 2 * PARAMETERS + 4 * 4
    assert first.timeline()["optimizer_states"][-1] == states
    assert first.timeline()["optimizer_states"][0] == 0
    assert set(second.timeline()["optimizer_states"]) == {states}


def test_states_from_before_the_tracker_are_counted_from_the_start():
    model = two_layers()
    optimizer = torch.optim.Adam(model.parameters())
    traced(model, torch.randn(2, 5), optimizer)
    (trace,) = traced(model, torch.randn(2, 5), optimizer)
    assert trace.at(0).optimizer_states == 4 * 2 * PARAMETERS + 4 * 4


def test_frozen_weights_and_projections_are_parts_and_not_counted_twice():
    config = RunConfig(model="tiny", method="lora", rank=4)
    model, optimizer = build(resolve(config))
    tracker = Tracker(model, optimizer)
    trace = tracker.trace()
    tracker.close()
    start = trace.at(0)
    assert start.frozen == sum(4 * p.numel() for p in model.parameters() if not p.requires_grad)
    assert start.total == start.weights == sum(4 * p.numel() for p in model.parameters())
    assert set(PARTS) | set(CATEGORIES) == set(NAMES)
    assert Breakdown(weights=3, frozen=2, projections=1, optimizer_states=1).total == 4


def test_the_peak_is_the_largest_sum_and_what_was_alive_then_adds_up_to_it():
    model = two_layers()
    trace = traced(model, torch.randn(2, 5), torch.optim.Adam(model.parameters()), steps=2)[1]
    assert trace.peak.total == trace.total().max() == trace.total()[trace.peak_event]
    assert sum(block.bytes for block in trace.alive()) == trace.peak.total
    assert sum(trace.by_owner().values()) == trace.peak.total


def test_what_was_alive_is_named_by_its_module_or_parameter():
    (trace,) = traced(two_layers(), torch.randn(2, 5))
    event = next(e for e, name in trace.phases if name == "backward")
    owners = {(block.category, block.owner) for block in trace.alive(event)}
    assert ("weights", "0.weight") in owners
    assert ("activations", "1") in owners  # made by the ReLU


def test_phases_are_the_named_ranges_in_order():
    (trace,) = traced(two_layers(), torch.randn(2, 5))
    names = [name for _, name in trace.phases]
    assert [n for n in names if n != "between"] == ["start", "forward", "backward", "optimizer"]


def test_memory_that_an_operation_hides_is_there_and_gone():
    class Decomposed(nn.Linear):
        def forward(self, x):
            return super().forward(x) * torch.linalg.qr(x)[1].sum()

    x, hidden = torch.randn(5, 5), {"aten::linalg_qr": lambda A, *args: 1 << 20}
    plain, more = (traced(Decomposed(5, 5), x, hidden=h)[0] for h in (None, hidden))
    assert more.peak.total - plain.peak.total > (1 << 20) - 2000
    assert more.total()[-1] == plain.total()[-1]


def test_blocks_are_rounded_up_to_the_allocator_s_granularity():
    model = nn.Linear(3, 1, bias=False)
    tracker = Tracker(model, torch.optim.SGD(model.parameters()), granularity=512)
    assert tracker.alive_bytes == 512
    tracker.close()


def test_views_and_in_place_operations_are_no_new_memory():
    model = nn.Linear(4, 4, bias=False)
    tracker = Tracker(model, torch.optim.SGD(model.parameters()))
    x = torch.zeros(8)
    with tracker:
        y = x.add_(1).view(2, 4).T
        assert tracker.alive_bytes == 4 * 16 + 4 * 8
        z = y.clone()
        assert tracker.alive_bytes == 4 * 16 + 2 * 4 * 8
        del z
    assert tracker.alive_bytes == 4 * 16 + 4 * 8
    tracker.close()


def test_fake_tensors_are_counted_as_real_ones():
    def peaks(mode):
        with mode:
            model = two_layers()
            optimizer = torch.optim.Adam(model.parameters())
            return [t.peak for t in traced(model, torch.zeros(2, 5), optimizer, steps=2)]

    assert peaks(FakeTensorMode()) == peaks(nullcontext())


def test_hooks_are_gone_after_closing():
    model = two_layers()
    tracker = Tracker(model, torch.optim.SGD(model.parameters()))
    tracker.close()
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
    assert all(not p._post_accumulate_grad_hooks for p in model.parameters())


def test_the_table_keeps_the_peak_however_few_points_it_has():
    model = two_layers()
    trace = traced(model, torch.randn(2, 5), torch.optim.Adam(model.parameters()), steps=2)[1]
    for points in (3, 10, 10_000):
        table = trace.table(points)
        assert table[list(CATEGORIES)].sum(axis=1).max() == trace.peak.total
        assert set(table["phase"]) >= {"backward"}


def peaks_in_training(method, follow, **fields):
    """Peak bytes of the first two steps; `follow` (model, optimizer, batch) gives a tracker and a
    function that reads its peak."""
    config = resolve(RunConfig(**{
        "model": "tiny", "method": method, "batch": 2, "sequence_length": 32, "steps": 9,
        "compile": False, **fields,
    }))  # fmt: skip
    model, optimizer = build(config)
    batch = [torch.randint(config.size.vocab_size, (2, 32)) for _ in range(2)]
    tracker, peak = follow(model, optimizer, batch)
    batches = list(zip(*(t.chunk(config.gradient_accumulation) for t in batch), strict=True))
    found = []
    for step in range(2):
        with tracker:
            take_step_(model, optimizer, batches, config, step)
        found.append(peak())
    return found


def followed_by_ours(model, optimizer, batch):
    tracker = Tracker(model, optimizer)
    for t in batch:
        tracker.record(t)
    return tracker, lambda: tracker.trace().peak.total


def followed_by_torch(model, optimizer, batch):
    tracker = MemTracker()
    tracker.track_external(model, optimizer, *batch)

    def peak():
        tracker.reset_mod_stats()
        return tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]

    return tracker, peak


@pytest.mark.parametrize("method", ["full-rank", "low-rank"])
def test_peaks_equal_those_of_torch_s_own_tracker_to_the_byte(method):
    assert peaks_in_training(method, followed_by_ours) == peaks_in_training(
        method, followed_by_torch
    )


@pytest.mark.filterwarnings("ignore:global module forward hook")
@pytest.mark.parametrize(
    ("method", "fields", "error"),
    [
        ("lora", {}, RuntimeError),  # a hook on a frozen parameter
        ("full-rank", {"gradient_accumulation": 2}, NotImplementedError),
    ],
)
def test_torch_s_own_tracker_still_refuses_what_ours_follows(method, fields, error):
    """If this fails, read the reasons in tracker.py again."""
    first, second = peaks_in_training(method, followed_by_ours, **fields)
    assert first < second
    with pytest.raises(error):
        peaks_in_training(method, followed_by_torch, **fields)
