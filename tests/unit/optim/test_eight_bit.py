"""Moments in 8 bits: against a transcription of decode, update, encode; bytes; save and go on."""

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from lowrank_lab import InputError, RunConfig
from lowrank_lab.device import cuda_path
from lowrank_lab.memory.breakdown import persistent, tensor_bytes
from lowrank_lab.memory.formulas import by_formula
from lowrank_lab.methods.build import build
from lowrank_lab.methods.resolve import resolve
from lowrank_lab.optim import Apollo, Fira, GaLore, GoLore, Loro, ProjectedAdamW, Spam, block_codes
from lowrank_lab.optim.adam import MOMENTS, is_quantized
from lowrank_lab.optim.block_codes import Codes
from lowrank_lab.optim.eight_bit import eight_bit_bytes, is_quantizable, read_moment
from lowrank_lab.planning.simulate import measure, simulate
from lowrank_lab.techniques import prune_moments_, refactorize_, reset_momentum_
from lowrank_lab.training.checkpoint import load, save
from lowrank_lab.training.step import gradients, update_

torchao_8bit = pytest.importorskip("torchao.optim.subclass_8bit")
PROJECTED = [GaLore, Fira, Apollo, GoLore]
LR, BETAS, EPS, GAP = 0.01, (0.9, 0.999), 1e-6, 5
SHAPES = {"tall": (160, 64), "wide": (64, 160), "square": (128, 128)}
RANK = 32  # a projected moment has 4096 entries or more


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def start(shape):
    return 0.01 * normal(*shape)  # of the size of an update


def make(method=GaLore, shape=(160, 64), dtype=torch.float32, precision="8bit", rank=RANK, **keys):
    W = nn.Parameter(start(shape).to(dtype))
    b = nn.Parameter(0.01 * normal(64, 128, seed=1).to(dtype))
    small = nn.Parameter(normal(7, seed=2).to(dtype))
    refresh = {} if method is Apollo else {"refresh": "svd"}
    groups = [{"params": [W], "rank": rank, "update_proj_gap": GAP, **refresh, **keys}]
    groups.append({"params": [b, small]})
    optimizer = method(groups, lr=LR, betas=BETAS, eps=EPS, state_precision=precision)
    return [W, b, small], optimizer


def give(params, step, scale=1.0):
    for i, p in enumerate(params):
        p.grad = scale * normal(*p.shape, seed=100 * step + i).to(p.dtype)


def take(params, optimizer, first, last):
    for step in range(first, last):
        give(params, step)
        optimizer.step()


class Blocks:
    """One moment, transcribed: 256 entries a block, the nearest of 256 values of its largest."""

    def __init__(self, shape, signed):
        get = torchao_8bit.get_qmap_signed if signed else torchao_8bit.get_qmap_unsigned
        self.table = torch.tensor(get(), dtype=torch.float64)
        self.values = torch.zeros(shape, dtype=torch.float64)

    def store(self, x):
        blocks = x.reshape(-1, 256)
        scale = blocks.abs().amax(1, keepdim=True).clamp(min=1e-12)
        nearest = ((blocks / scale)[..., None] - self.table).abs().argmin(-1)
        self.values = (self.table[nearest] * scale).reshape(x.shape)


class Transcribed:
    """Adam on moments that are decoded, updated and encoded again, in float64."""

    def __init__(self, shape):
        self.m, self.v, self.t = Blocks(shape, True), Blocks(shape, False), 0

    def direction(self, R):
        self.t += 1
        m = BETAS[0] * self.m.values + (1 - BETAS[0]) * R
        v = BETAS[1] * self.v.values + (1 - BETAS[1]) * R**2
        self.m.store(m)
        self.v.store(v)
        correction = (1 - BETAS[1] ** self.t) ** 0.5 / (1 - BETAS[0] ** self.t)
        return correction * m / (v.sqrt() + EPS)


# The code of a block


@pytest.mark.parametrize("signed", [True, False])
def test_each_entry_is_the_nearest_of_the_table_times_the_largest_of_its_block(signed):
    values = normal(64, 256) * 10.0 ** torch.arange(-6, 2).repeat_interleave(8)[:, None]
    values = values if signed else values.abs()
    values[3], values[5, :200] = 0, 0
    moment = torchao_8bit.OptimState8bit.zeros((64, 256), signed)
    Codes.of([moment]).encode_(values.flatten())
    reference = Blocks((64, 256), signed)
    reference.store(values.double())
    ours = read_moment(moment)
    # two values of the table are equally near to an entry that rounding decides
    wrong = (ours - reference.values).abs() > 1e-6 * reference.values.abs() + 1e-15
    assert wrong.double().mean() < 1e-3
    distance = (ours - values).abs() - (reference.values - values).abs()
    assert (distance <= 1e-6 * values.abs().amax(1, keepdim=True)).all()
    theirs = torchao_8bit.OptimState8bit.zeros((64, 256), signed)
    theirs.copy_(values)
    assert (theirs.codes != moment.codes).double().mean() < 1e-3
    assert torch.equal(theirs.scale, moment.scale)
    assert torch.equal(theirs.dequantize()[3], ours[3])


@pytest.mark.parametrize("signed", [True, False])
def test_a_cpu_finds_the_codes_that_a_search_finds(signed):
    moment = torchao_8bit.OptimState8bit.zeros((1 << 13, 256), signed)
    table = moment.qmap
    middles = (table[1:] + table[:-1]) / 2
    ones, zero = torch.ones(255), torch.tensor([-0.0, 1.0])
    near = [table, middles, middles.nextafter(-ones), middles.nextafter(ones), zero]
    x = torch.cat([*near, 2 * torch.rand((1 << 21) - 1023) - 1])
    x = x if signed else x.abs()
    codes = Codes.of([moment])
    with cuda_path():
        expected = codes._nearest(x)
    assert torch.equal(codes._nearest(x).int(), expected.int())
    halves = torch.arange(1 << 16, dtype=torch.int32) << 16
    ends = [bits.view(torch.float32) for bits in (halves, halves | 0xFFFF)]
    inside = (ends[0].abs() <= 1) & (ends[1].abs() <= 1)  # one middle at most between the ends
    assert (torch.bucketize(ends[0], middles) - torch.bucketize(ends[1], middles))[
        inside
    ].abs().max() <= 1


def test_zeros_stay_zero_and_nan_is_not_hidden():
    moment = torchao_8bit.OptimState8bit.zeros((16, 256), True)
    codes = Codes.of([moment])
    assert not codes.decode().any()
    codes.encode_(torch.zeros(4096))
    assert not codes.decode().any()
    values = normal(4096)
    values[300] = torch.nan
    codes.encode_(values)
    assert codes.decode()[256:512].isnan().all()
    assert codes.decode()[:256].isfinite().all()


@pytest.mark.parametrize("entries", [1, 4095, 4096, 4097, 8192])
def test_only_moments_of_whole_blocks_and_4096_entries_are_quantized(entries):
    fits = entries in (4096, 8192)
    assert is_quantizable(entries) is fits
    expected = entries + 4 * entries // 256 + 1024 if fits else 4 * entries
    assert eight_bit_bytes(entries, otherwise=4) == expected
    if fits:
        moment = torchao_8bit.OptimState8bit.zeros((entries,), True)
        assert tensor_bytes([moment]) == expected


# Updates


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_galore_follows_decode_update_and_encode_with_refreshes(shape):
    params, optimizer = make(GaLore, shape)
    W, left = params[0].detach().double(), shape[0] < shape[1]
    adam = Transcribed((RANK, shape[1]) if left else (shape[0], RANK))
    for step in range(30):
        give(params, step)
        G = params[0].grad.double()
        optimizer.step()
        state = optimizer.state[params[0]]
        P = state["projection_left" if left else "projection_right"].double()
        N = adam.direction(P.T @ G if left else G @ P)
        W = W - LR * 0.25 * (P @ N if left else N @ P.T)
        if step % 10 == 0:  # codes of entries half-way between two values differ by rounding
            m = read_moment(state["exp_avg"]).double()
            assert (m - adam.m.values).norm() <= 2e-3 * m.norm()
    moved = W - start(shape).double()
    assert (params[0].double() - W).norm() <= 1e-3 * moved.norm()


def test_one_step_equals_the_transcription_to_rounding():
    params, optimizer = make(GaLore)
    adam, plain = Transcribed((160, RANK)), Transcribed((64, 128))
    before = [p.detach().double() for p in params]
    give(params, 0)
    optimizer.step()
    P = optimizer.state[params[0]]["projection_right"].double()
    step = 0.25 * adam.direction(params[0].grad.double() @ P) @ P.T
    for p, old, N in zip(params, before, (step, plain.direction(params[1].grad.double())),
                         strict=False):  # fmt: skip
        assert (p.double() - (old - LR * N)).norm() <= 1e-5 * (LR * N).norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", PROJECTED)
def test_every_projected_optimizer_stays_near_its_run_with_wide_moments(method, dtype):
    ours, optimizer = make(method, dtype=dtype)
    theirs, exact = make(
        method, dtype=dtype, precision="fp32" if dtype != torch.float32 else "same"
    )
    start = [p.detach().double() for p in ours]
    take(ours, optimizer, 0, 12), take(theirs, exact, 0, 12)
    for p, q, old in zip(ours[:2], theirs[:2], start, strict=False):
        assert (p - q).double().norm() <= 0.1 * (q.double() - old).norm()
    assert torch.equal(ours[2], theirs[2])  # a small one has float32 moments
    for p, name in ((p, name) for p in ours[:2] for name in MOMENTS):
        assert is_quantized(optimizer.state[p][name])
    assert optimizer.state[ours[2]]["exp_avg"].dtype == torch.float32


@pytest.mark.parametrize("method", PROJECTED)
def test_zero_gradients_leave_finite_weights_and_then_train_on(method):
    params, optimizer = make(method)
    for step, scale in enumerate((0.0, 0.0, 1.0, 0.0, 1.0, 0.0, 1.0)):
        give(params, step, scale)
        optimizer.step()
        assert all(p.isfinite().all() for p in params)
    assert not torch.equal(params[0], start((160, 64)))


def test_large_moments_are_updated_in_pieces_of_whole_blocks(monkeypatch):
    whole, first = make()
    pieces, second = make()
    take(whole, first, 0, 3)
    monkeypatch.setattr(block_codes, "PIECE_ON_CPU", 1024)
    take(pieces, second, 0, 3)
    assert all(torch.equal(p, q) for p, q in zip(whole, pieces, strict=True))


@pytest.mark.parametrize("method", PROJECTED)
def test_many_matrices_together_are_updated_as_one_after_the_other(method):
    def trained(together):
        shapes = [(160, 64), (64, 160), (160, 64), (160, 64), (40, 48), (40, 48), (64, 160)]
        params = [nn.Parameter(normal(*s, seed=i)) for i, s in enumerate(shapes)]
        keys = {"proj": "random"} if method is Apollo else {"refresh": "svd"}
        group = {"params": params, "rank": RANK, "update_proj_gap": 3, **keys}
        optimizer = method([group], lr=LR, state_precision="8bit")
        for step in range(7):
            give(params, step)
            with cuda_path() if together else nullcontext():
                optimizer.step()
        return params, optimizer

    (ours, stacked), (theirs, plain) = trained(True), trained(False)
    for i, (p, q) in enumerate(zip(ours, theirs, strict=True)):
        moved = (q - normal(*q.shape, seed=i)).norm()
        assert (p - q).norm() <= 1e-3 * moved
        coded = [is_quantized(o.state[x]["exp_avg"]) for o, x in ((stacked, p), (plain, q))]
        assert coded == [min(p.shape) > 40] * 2


# States


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", PROJECTED)
def test_a_saved_state_goes_on_bit_for_bit(method, dtype, tmp_path):
    params, optimizer = make(method, dtype=dtype)
    take(params, optimizer, 0, 7)
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    others, again = make(method, dtype=dtype)
    with torch.no_grad():
        for p, q in zip(others, params, strict=True):
            p.copy_(q)
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=False))
    take(params, optimizer, 7, 13), take(others, again, 7, 13)
    assert all(torch.equal(p, q) for p, q in zip(params, others, strict=True))


def test_a_state_of_galore_s_package_is_encoded_when_it_is_loaded():
    galore_torch = pytest.importorskip("galore_torch")
    W = nn.Parameter(normal(160, 64))
    keys = {"rank": RANK, "update_proj_gap": 200, "scale": 0.25, "proj_type": "std"}
    theirs = galore_torch.GaLoreAdamW([{"params": [W], **keys}], lr=LR, no_deprecation_warning=True)
    give([W], 0)
    theirs.step()
    ours = GaLore([{"params": [W], **keys}], lr=LR, state_precision="8bit")
    ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
    moment, given = ours.state[W]["exp_avg"], theirs.state[W]["exp_avg"]
    assert is_quantized(moment)
    assert (read_moment(moment) - given).norm() <= 0.02 * given.norm()
    give([W], 1)
    ours.step()


@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_resets_and_pruning_know_the_codes(strength):
    params, optimizer = make()
    take(params, optimizer, 0, 3)
    before = read_moment(optimizer.state[params[0]]["exp_avg"])
    assert reset_momentum_(optimizer, strength) == 3
    after = read_moment(optimizer.state[params[0]]["exp_avg"])
    assert (after - (1 - strength) * before).norm() <= 0.02 * before.norm()
    assert strength < 1 or not after.any()
    assert prune_moments_(optimizer, params, 0.5) == 3
    take(params, optimizer, 3, 5)
    assert all(p.isfinite().all() for p in params)


# Runs


def run_config(method, **values):
    small = {"model": "tiny", "hidden_size": 64, "intermediate_size": 88, "corpus": "markov"}
    return RunConfig(**{
        **small, "vocab_size": 128, "method": method, "state_precision": "8bit", "batch": 2,
        "sequence_length": 16, "rank": None if method == "apollo-mini" else 16, **values,
    })  # fmt: skip


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("method", ["galore", "golore", "fira", "apollo", "apollo-mini"])
def test_bytes_by_formula_simulated_and_measured_agree(method, precision):
    config = run_config(method, precision=precision, rank=None if method == "apollo-mini" else 64)
    counted = by_formula(resolve(config))
    for report in (simulate(config), measure(config)):
        assert report.persistent.optimizer_states == counted.optimizer_states
        assert report.persistent.projections == counted.projections
    wide = by_formula(resolve(config.replace(state_precision="same")))
    assert counted.optimizer_states < wide.optimizer_states * (0.75 if precision == "bf16" else 0.5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", ["low-rank", "lora", "relora", "sltrain", "cola"])
def test_factors_have_torchao_s_adamw_with_the_bytes_of_the_formula(method):
    config = resolve(run_config(method, rank=64))
    model, optimizer = build(config)
    assert type(optimizer).__name__ == "AdamW8bit"
    tokens = torch.randint(16, (2, 17))
    with torch.compiler.set_stance("force_eager"):
        for _ in range(2):
            model.loss(tokens[:, :-1], tokens[:, 1:]).backward()
            optimizer.step()
    states = persistent(model, optimizer).optimizer_states
    assert states == by_formula(config).optimizer_states
    assert simulate(config).persistent.optimizer_states == states
    assert states < 0.5 * by_formula(config.override(state_precision="same")).optimizer_states


@pytest.mark.parametrize(
    ("values", "allowed"),
    [
        ({"method": "full-rank"}, "use the method adamw-8bit"),
        ({"method": "muon"}, "the optimizer of muon has no such choice"),
        ({"method": "loro"}, "the optimizer of loro has no such choice"),
        ({"method": "galore", "parallel": "fsdp2"}, "cut its blocks"),
        ({"method": "low-rank", "optimizer": "torch.optim.SGD"}, "its own; same"),
    ],
)
def test_what_can_not_be_combined_is_refused_in_one_line(values, allowed):
    rank = 16 if values["method"] not in ("full-rank", "muon") else None
    with pytest.raises(InputError, match=r"^state_precision: '8bit' is not allowed; ") as caught:
        resolve(run_config(**values, rank=rank))
    assert allowed in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("method", [ProjectedAdamW, Loro, Spam])
def test_optimizers_without_the_choice_refuse_it(method):
    groups = [nn.Parameter(normal(6, 2))]
    with pytest.raises((ValueError, TypeError), match="state_precision"):
        method(groups, state_precision="8bit")


def test_without_torchao_it_is_refused_before_anything_is_built(monkeypatch):
    def missing():
        raise ImportError("it needs torchao: pip install 'lowrank-lab[quant]'")

    for place in ("lowrank_lab.optim.checked", "lowrank_lab.methods.resolve"):
        monkeypatch.setattr(f"{place}.torchao_optim", missing)
    with pytest.raises(
        ValueError, match=r"^state_precision: '8bit' is not allowed; it needs torch"
    ):
        make()
    with pytest.raises(InputError, match=r"^state_precision: .*pip install"):
        resolve(run_config("galore"))


def test_a_simulation_in_a_fresh_process_makes_the_tables_from_real_numbers():
    for get in (torchao_8bit.get_qmap_signed, torchao_8bit.get_qmap_unsigned):
        get.cache_clear()
    assert simulate(run_config("galore")).persistent.optimizer_states


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", ["galore", "cola"])
def test_a_checkpoint_goes_on_bit_for_bit(method, tmp_path):
    config = resolve(run_config(method, rank=64, steps=8, lr=1e-2))

    def trained(built, first, last):
        for step in range(first, last):
            tokens = torch.randint(16, (2, 17), generator=torch.Generator().manual_seed(step))
            gradients(built[0], [(tokens[:, :-1], tokens[:, 1:])], config)
            update_(*built, config, step)
        return dict(built[0].named_parameters())

    with torch.compiler.set_stance("force_eager"):
        whole, first, second = build(config), build(config), build(config)
        expected = trained(whole, 0, 8)
        trained(first, 0, 5)
        save(tmp_path, 5, *first)
        assert load(tmp_path, *second)[0] == 5
        found = trained(second, 5, 8)
    assert all(torch.equal(found[name], p) for name, p in expected.items())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("on_refactor", ["keep", "reset", "transport"])
def test_events_of_factors_follow_in_8_bits(on_refactor):
    config = resolve(run_config("low-rank", rank=64, lr=1e-2))
    model, optimizer = build(config)
    with torch.compiler.set_stance("force_eager"):
        for step in range(3):
            tokens = torch.randint(16, (2, 17))
            gradients(model, [(tokens[:, :-1], tokens[:, 1:])], config)
            update_(model, optimizer, config, step)
        B = model.model.layers[0].mlp.up_proj.B
        before = read_moment(optimizer.state[B]["exp_avg"])
        assert refactorize_(model, optimizer, on_refactor).changed
    after = read_moment(optimizer.state[B]["exp_avg"])
    assert is_quantized(optimizer.state[B]["exp_avg"])
    assert torch.equal(after, before) is (on_refactor == "keep")
    assert after.any().item() is (on_refactor != "reset")


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("method", PROJECTED)
def test_a_step_that_the_device_turns_off_changes_no_code_and_no_weight(method, together):
    params = [nn.Parameter(normal(160, 64, seed=i)) for i in range(3)]
    keys = {"proj": "random"} if method is Apollo else {"refresh": "svd"}
    groups = [{"params": params[:2], "rank": RANK, "update_proj_gap": 100, **keys}]
    groups.append({"params": params[2:]})
    optimizer = method(groups, lr=LR, state_precision="8bit")
    take(params, optimizer, 0, 2)

    def contents():
        moments = [optimizer.state[p][name] for p in params for name in MOMENTS]
        return [p.detach().clone() for p in params] + [
            part.clone() for m in moments for part in (m.codes, m.scale)
        ]

    before = contents()
    give(params, 2)
    params[1].grad[3, 4] = params[2].grad[0, 0] = torch.nan
    optimizer.found_inf = torch.ones(())
    with cuda_path() if together else nullcontext():
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, contents(), strict=True))
    optimizer.found_inf = torch.zeros(())
    give(params, 3)
    with cuda_path() if together else nullcontext():
        optimizer.step()
    assert not any(torch.equal(a, b) for a, b in zip(before[:3], contents(), strict=False))


@pytest.mark.parametrize("how", ["keep", "reset", "transport"])
@pytest.mark.parametrize("method", [GaLore, Fira])
def test_what_a_refresh_does_to_moments_it_does_in_8_bits(method, how):
    ours, optimizer = make(method, on_refresh=how)
    theirs, exact = make(method, on_refresh=how, precision="same")
    take(ours, optimizer, 0, 12), take(theirs, exact, 0, 12)
    assert is_quantized(optimizer.state[ours[0]]["exp_avg"])
    moved = theirs[0] - start((160, 64))
    assert (ours[0] - theirs[0]).norm() <= 0.1 * moved.norm()
