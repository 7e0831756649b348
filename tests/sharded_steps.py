"""Optimizer steps on DTensors in gloo processes, each compared with the same steps on full tensors.

python tests/sharded_steps.py WHAT FOLDER, as rank $RANK of $WORLD_SIZE. Results go to
FOLDER/WHAT.RANK.json: by the name of a case, the largest difference to one process in weights and
states, or what was raised.
"""

import json
import os
import sys
import traceback
from functools import partial
from itertools import product
from pathlib import Path

import torch
from processes import gloo
from torch import nn

import lowrank_lab as lab
from lowrank_lab import optim
from lowrank_lab.distributed.dtensors import full_tensor, local_part, overwrite_
from lowrank_lab.layers import merge_
from lowrank_lab.techniques import prune_moments_
from lowrank_lab.techniques.refactorization import factorized_layers

STEPS = 9
RANKED = {"rank": 3, "update_proj_gap": 4}
SHAPES = ((12, 8), (8, 12), (9, 7), (6, 6), (5,))


def ranked(method, **keys):
    """An optimizer of matrices with a rank, and of other parameters."""

    def build(params, **options):
        matrices = [p for p in params if p.ndim == 2]
        rest = [p for p in params if p.ndim != 2]
        groups = [{"params": matrices, **RANKED, **keys}, {"params": rest}]
        return method(groups, lr=0.02, weight_decay=0.1, **options)

    return build


def by_density(**keys):
    """FRUGAL with a rank of its own for each shape."""

    def build(params, **options):
        matrices = [p for p in params if p.ndim == 2]
        rest = [p for p in params if p.ndim != 2]
        group = {"params": matrices, "density": 0.4, "update_proj_gap": 4, **keys}
        return optim.Frugal([group, {"params": rest}], lr=0.02, weight_decay=0.1, **options)

    return build


def every_step(**keys):
    """LDAdam, which has no period."""

    def build(params, **options):
        matrices = [p for p in params if p.ndim == 2]
        rest = [p for p in params if p.ndim != 2]
        groups = [{"params": matrices, "rank": 3, **keys}, {"params": rest}]
        return optim.LDAdam(groups, lr=0.02, weight_decay=0.1, **options)

    return build


def uniform(method, **keys):
    return partial(method, lr=0.02, weight_decay=0.1, **keys)


def loro(params, **options):
    group = {"params": params[:4], "rank": 2, "update_k": 3}
    return optim.Loro([group, {"params": params[4:]}], lr=0.02, weight_decay=0.1, **options)


def marked(method, **keys):
    """An optimizer of matrices in a group with a marker, and of other parameters."""

    def build(params, **options):
        matrices = [p for p in params if p.ndim == 2]
        rest = [p for p in params if p.ndim != 2]
        groups = [{"params": matrices, **keys}, {"params": rest}]
        return method(groups, lr=0.02, weight_decay=0.1, **options)

    return build


def spectron(params, **options):
    group = {"params": params[:4], "rank": 2, "ns_precision": "fp32"}
    return optim.Spectron([group, {"params": params[4:]}], lr=0.02, weight_decay=0.1, **options)


REFRESHES = ("svd", "gram", "subspace", "randomized")
METHODS = {
    "adamw": uniform(optim.ProjectedAdamW),
    **{f"{name} {refresh}": ranked(method, refresh=refresh)
       for (name, method), refresh in product(
           {"galore": optim.GaLore, "fira": optim.Fira}.items(), REFRESHES)},
    **{f"galore {side}": ranked(optim.GaLore, proj_type=side)
       for side in ("left", "right", "reverse_std", "full")},
    **{f"galore full {refresh}": ranked(optim.GaLore, proj_type="full", refresh=refresh)
       for refresh in ("gram", "randomized")},
    "galore spread": ranked(optim.GaLore, spread_refresh=True),
    **{f"{name} {side} {how}": ranked(method, proj_type=side, on_refresh=how)
       for name, method, side in (("galore", optim.GaLore, "std"), ("galore", optim.GaLore, "full"),
                                  ("fira", optim.Fira, "std"), ("golore", optim.GoLore, "std"))
       for how in ("reset", "transport")},
    **{f"frugal {proj}": ranked(optim.Frugal, proj=proj) for proj in ("svd", "columns", "random")},
    "frugal gram density": by_density(refresh="gram"),
    "ldadam": every_step(error_feedback=True),
    "ldadam alone": every_step(error_feedback=False),
    "golore": ranked(optim.GoLore, switch=4),
    "golore random": ranked(optim.GoLore),
    "golore full": ranked(optim.GoLore, proj_type="full", switch=4),
    "apollo": ranked(optim.Apollo),
    "apollo svd": ranked(optim.Apollo, proj="svd"),
    "apollo gram": ranked(optim.Apollo, proj="gram"),
    "apollo seed": ranked(optim.Apollo, store_projection=False),
    "apollo-mini": ranked(optim.Apollo, scale_type="tensor", rank=1, scale=4.0),
    "spam": uniform(optim.Spam, update_proj_gap=4, warmup=2, grad_accu_steps=1, threshold=5.0),
    "spam half": uniform(optim.Spam, update_proj_gap=4, warmup=2, density=0.5),
    "stable-spam": uniform(optim.StableSpam, update_proj_gap=4),
    "loro": loro,
    "scale": marked(optim.Scale, norm_dim=1),
    "scale momentum": marked(optim.Scale, norm_dim=1, momentum=0.9),
    "scale columns": marked(optim.Scale, norm_dim=0),
    "normuon": marked(optim.NorMuon, use_muon=True, ns_precision="fp32"),
    "normuon rms": marked(
        optim.NorMuon, use_muon=True, ns_precision="fp32", update_scale="match_rms"
    ),
    "spectron": spectron,
}  # fmt: skip
PRECISE = {"state_precision": "fp32", "stochastic_rounding": True}


FACTORED = ("loro", "spectron")


def numbers(shape, seed, dtype=None):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype or torch.get_default_dtype())


def shapes_of(name):
    return ((12, 2), (2, 9), (7, 2), (2, 8), (5,), (4, 3)) if name in FACTORED else SHAPES


def parameters(name, dtype=torch.float32):
    return [nn.Parameter(numbers(s, i, dtype)) for i, s in enumerate(shapes_of(name))]


def on_mesh(t, mesh, placements):
    """The DTensor of a full tensor; a dimension that the tensor hasn't is the first one."""
    from torch.distributed.tensor import Shard, distribute_tensor

    fitting = [Shard(0) if isinstance(q, Shard) and q.dim >= t.ndim else q for q in placements]
    return distribute_tensor(t.detach().clone(), mesh, fitting, src_data_rank=None)


def sharded(params, mesh, placements):
    return [nn.Parameter(on_mesh(p, mesh, placements)) for p in params]


def give_gradients_(params, step):
    for i, p in enumerate(params):
        spike = 30.0 if step % 5 == 3 else 1.0
        G = spike * numbers(p.shape, 1000 * step + i, p.dtype)
        if i == 3 and step == 2:
            p.grad = None  # on all ranks
        elif hasattr(p, "device_mesh"):
            p.grad = on_mesh(G, p.device_mesh, p.placements)
        else:
            p.grad = G


def take_steps(params, optimizer, steps):
    for step in steps:
        give_gradients_(params, step)
        optimizer.step()


def difference(params, optimizer, others, other):
    """The largest difference of weights and of states of two optimizers."""
    pairs = list(zip(params, others, strict=True))
    found = []
    for p, q in pairs:
        entries = {"weight": (p, q)}
        ours, theirs = optimizer.state[p], other.state[q]
        assert ours.keys() == theirs.keys(), (ours.keys(), theirs.keys())
        entries |= {key: (value, theirs[key]) for key, value in ours.items()}
        for key, values in entries.items():
            a, b = (full_tensor(torch.as_tensor(v)).detach().double() for v in values)
            assert a.shape == b.shape, (key, a.shape, b.shape)
            found.append((a - b).abs().max() / b.abs().max().clamp(min=1.0))
    return max(map(float, found))


def check_stored_in_parts(optimizer, placements):
    """States other than single numbers are DTensors, sharded where the parameters are."""
    shares = 1 if all(q.is_replicate() for q in placements) else 2
    for state in optimizer.state.values():
        for key, value in state.items():
            if isinstance(value, torch.Tensor) and value.ndim and value.dtype != torch.int64:
                local = local_part(value)
                assert local is not value, key
                assert local.untyped_storage().nbytes() == local.nbytes, key
                rows = max(value.shape)
                assert local.numel() <= value.numel() / shares * (1 + shares / rows), key


def compare(name, mesh, placements, dtype=torch.float32, **options):
    """A method on DTensors and on full tensors."""
    plain = parameters(name, dtype)
    ours = sharded(plain, mesh, placements)
    theirs, mine = METHODS[name](plain, **options), METHODS[name](ours, **options)
    take_steps(plain, theirs, range(STEPS))
    take_steps(ours, mine, range(STEPS))
    check_stored_in_parts(mine, placements)
    return difference(ours, mine, plain, theirs)


def refuses_nan(name, mesh):
    """A gradient that can't be decomposed ends the step on all ranks, with nothing changed."""
    from torch.distributed.tensor import Shard

    params = sharded(parameters(name), mesh, [Shard(0)])
    optimizer = METHODS[name](params)
    give_gradients_(params, 0)
    local_part(params[0].grad).fill_(torch.nan)
    before = [full_tensor(p).clone() for p in params]
    try:
        optimizer.step()
    except (torch.linalg.LinAlgError, RuntimeError):
        pairs = zip(params, before, strict=True)
        return max(float((full_tensor(p) - q).abs().max()) for p, q in pairs)
    return "no error"


def steps_cases():
    """Names of cases and functions that return a difference."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard

    size = dist.get_world_size()
    meshes = {f"shard {dim}": ((size,), [Shard(dim)]) for dim in range(2)}
    if size == 2:
        meshes |= {"replicate": ((size,), [Replicate()]), "hsdp": ((1, 2), [Replicate(), Shard(0)])}
    if size == 4:
        meshes = {
            "hsdp": ((2, 2), [Replicate(), Shard(0)]),
            "two ways": ((2, 2), [Shard(0), Shard(1)]),
            "twice": ((2, 2), [Shard(0), Shard(0)]),
        }
    for way, (shape, placements) in meshes.items():
        mesh = init_device_mesh("cpu", shape)
        for name in METHODS:
            yield f"{name}, {way}", partial(compare, name, mesh, placements)
    if size == 2:
        mesh = init_device_mesh("cpu", (2,))
        for name in ("galore svd", "galore gram", "galore full", "golore", "apollo svd"):
            yield f"{name}, not finite", partial(refuses_nan, name, mesh)
        for name in ("adamw", "galore svd", "fira gram", "apollo", "golore"):
            rounded = partial(compare, name, mesh, [Shard(0)], torch.bfloat16, **PRECISE)
            yield f"{name}, rounded", rounded


class Parameters(nn.Module):
    """The parameters of a case as a module, which FSDP2 and checkpoints ask for."""

    def __init__(self, name):
        super().__init__()
        self.weights = nn.ParameterList(parameters(name))


def modules(name, mesh):
    """A module in shards and one of full tensors, each with its optimizer."""
    from torch.distributed.fsdp import fully_shard

    ours, theirs = Parameters(name), Parameters(name)
    if mesh is not None:
        fully_shard(ours, mesh=mesh)
    return [(m, METHODS[name](list(m.parameters()))) for m in (ours, theirs)]


def saved_state(module, optimizer):
    from torch.distributed.checkpoint.state_dict import get_state_dict

    weights, states = get_state_dict(module, optimizer)
    return {"model": weights, "optimizer": states}


def save(name, mesh, folder):
    """Steps in shards and a reset, and their checkpoint."""
    from torch.distributed import checkpoint

    (module, optimizer), _ = modules(name, mesh)
    take_steps(list(module.parameters()), optimizer, range(5))
    lab.reset_momentum_(optimizer)
    checkpoint.save(saved_state(module, optimizer), checkpoint_id=folder / name)
    return 0.0


def load(name, mesh, folder):
    """Steps from the checkpoint, and the same steps without interruption on full tensors."""
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.state_dict import set_state_dict

    (module, optimizer), (plain, other) = modules(name, mesh)
    state = saved_state(module, optimizer)
    checkpoint.load(state, checkpoint_id=folder / name)
    set_state_dict(
        module, optimizer,
        model_state_dict=state["model"], optim_state_dict=state["optimizer"],
    )  # fmt: skip
    ours, theirs = list(module.parameters()), list(plain.parameters())
    take_steps(ours, optimizer, range(5, STEPS))
    take_steps(theirs, other, range(5))
    lab.reset_momentum_(other)
    take_steps(theirs, other, range(5, STEPS))
    if mesh is not None:
        check_stored_in_parts(optimizer, ours[0].placements)
    return difference(ours, optimizer, theirs, other)


def checkpoint_cases(act, folder):
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    size = dist.get_world_size()
    mesh = init_device_mesh("cpu", (size,)) if size > 1 else None
    for name in METHODS:
        yield name, partial(act, name, mesh, folder)


class Net(nn.Module):
    """Two blocks of linear layers and a head."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        blocks = [nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 12)) for _ in range(2)]
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Linear(12, 7)

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def net(kind):
    model = Net()
    return lab.factorize(model, kind=kind, rank=4, target="blocks") if kind else model


def fsdp(model, **how):
    """The model in shards: each block, and the rest."""
    from torch.distributed.fsdp import fully_shard

    for module in [*model.blocks, model]:
        fully_shard(module, **how)
    return model


def train(model, optimizer, steps, act=None):
    """Steps on the same batch on every rank; `act` follows the fourth, after an evaluation."""
    for step in range(steps):
        x = numbers((6, 12), 100 + step)
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if act is not None and step == 3:
            with torch.no_grad():
                model(x)  # FSDP2 leaves the weights of its root gathered
            act(model, optimizer)


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=0.02, fused=True)


def ours(model):
    return optim.ProjectedAdamW(model.parameters(), lr=0.02)


def galore(model):
    matrices = [p for n, p in model.named_parameters() if "blocks" in n and p.ndim == 2]
    rest = [p for n, p in model.named_parameters() if "blocks" not in n or p.ndim != 2]
    return optim.GaLore([{"params": matrices, "rank": 3}, {"params": rest}], lr=0.02)


def of_pairs(model):
    """Spectron on the factors of a model."""
    pairs = [f for _, layer in factorized_layers(model) for f in layer.factors()]
    rest = [p for p in model.parameters() if not any(p is f for f in pairs)]
    group = {"params": pairs, "rank": 4, "ns_precision": "fp32"}
    return optim.Spectron([group, {"params": rest}], lr=0.1)


def refactor(on_refactor, basis="singular"):
    return lambda model, optimizer: lab.refactorize_(model, optimizer, on_refactor, basis)


def reset(strength=1.0):
    return lambda model, optimizer: lab.reset_momentum_(optimizer, strength)


def prune(how):
    def act(model, optimizer):
        params = [p for group in optimizer.param_groups for p in group["params"]]
        prune_moments_(optimizer, params, 0.3, how)

    return act


def merge(model, optimizer):
    merge_(model, seed=3)
    lab.reset_momentum_(optimizer)


ACTS = {
    **{f"{kind} {how} {basis} {opt.__name__}": (kind, opt, refactor(how, basis))
       for kind in ("low-rank", "sltrain") for how in ("keep", "reset", "transport")
       for basis in ("singular", "nearest") for opt in (adamw, ours)},
    **{f"low-rank {how} spectron": ("low-rank", of_pairs, refactor(how))
       for how in ("keep", "reset", "transport")},
    "low-rank reset 0.7 spectron": ("low-rank", of_pairs, reset(0.7)),
    **{f"{opt.__name__} reset {strength}": (None, opt, reset(strength))
       for opt in (adamw, ours, galore) for strength in (1.0, 0.7)},
    **{f"{opt.__name__} pruned {how}": (None, opt, prune(how))
       for opt in (adamw, ours, galore) for how in ("magnitude", "random")},
    **{f"merge {opt.__name__}": ("lora", opt, merge) for opt in (adamw, ours)},
}  # fmt: skip


def act_on(case, **how):
    """A technique in the middle of training, in shards and on full tensors."""
    kind, optimizer, act = ACTS[case]
    plain, sharded = net(kind), fsdp(net(kind), **how)
    pair = [(model, optimizer(model)) for model in (plain, sharded)]
    for model, each in pair:
        train(model, each, 7, act)
    (_, theirs), (_, ours_) = pair
    for module in sharded.modules():
        if hasattr(module, "reshard"):
            module.reshard()
    return difference(list(sharded.parameters()), ours_, list(plain.parameters()), theirs)


def technique_cases(folder):
    torch.set_default_dtype(torch.float64)  # other sums: rounding that Adam amplifies
    for case in ACTS:
        yield case, partial(act_on, case)
    for case in ("low-rank transport singular ours", "galore reset 0.7", "merge ours"):
        yield f"{case}, kept", partial(act_on, case, reshard_after_forward=False)
    yield "not finite", refuses_factors_that_are_not_finite
    yield "ddp", with_ddp
    yield "mixed precision", with_mixed_precision
    yield "full checkpoint", from_full_checkpoint


def refuses_factors_that_are_not_finite():
    """What one rank alone sees is refused by all, before any layer has changed."""
    import torch.distributed as dist

    model = fsdp(net("low-rank"))
    last = [p for name, p in model.named_parameters() if name.endswith(".A")][-1]
    if dist.get_rank() == 1:
        local_part(last).fill_(torch.nan)
    before = [full_tensor(p).clone() for p in model.parameters()]
    try:
        lab.refactorize_(model)
    except ValueError:
        pairs = zip(model.parameters(), before, strict=True)
        return max(float((full_tensor(p) - q).nan_to_num().abs().max()) for p, q in pairs)
    return "no error"


def tensor_parallel_cases(folder):
    torch.set_default_dtype(torch.float64)
    for name in (
        "adamw",
        "galore svd",
        "fira gram",
        "apollo",
        "spam half",
        "stable-spam",
        "scale",
        "normuon",
    ):
        yield name, partial(with_tensor_parallel, name)


def with_tensor_parallel(name):
    """FSDP2 over tensor parallelism: of some weights, each rank has a strided shard."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    plain, sharded = net(None), net(None)
    for block in sharded.blocks:
        plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
        parallelize_module(block, mesh["tensor"], plan)
    fsdp(sharded, mesh=mesh["data"])
    pair = [(m, METHODS[name](list(m.parameters()))) for m in (plain, sharded)]
    for model, optimizer in pair:
        train(model, optimizer, 7, reset(0.7))
    (_, theirs), (_, ours_) = pair
    for module in [*sharded.blocks, sharded]:
        module.reshard()
    return difference(list(sharded.parameters()), ours_, list(plain.parameters()), theirs)


def with_ddp():
    from torch.nn.parallel import DistributedDataParallel

    plain, wrapped = net(None), DistributedDataParallel(net(None))
    pair = [(model, galore(model)) for model in (plain, wrapped)]
    for model, optimizer in pair:
        train(model, optimizer, 7, reset(0.7))
    (_, theirs), (_, ours_) = pair
    return difference(list(wrapped.parameters()), ours_, list(plain.parameters()), theirs)


def with_mixed_precision():
    """Weights and moments keep their dtype where FSDP2 computes in bfloat16."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    for reduce in (torch.float32, torch.bfloat16):
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=reduce)
        model = fsdp(net(None), mp_policy=policy)
        before = [full_tensor(p).detach().clone() for p in model.parameters()]
        optimizer = galore(model)
        train(model, optimizer, 4)
        for p, old in zip(model.parameters(), before, strict=True):
            state = optimizer.state[p]
            assert p.dtype == state["exp_avg"].dtype == torch.get_default_dtype()
            change = (full_tensor(p) - old).abs().max()
            assert 0 < change < 1, change
    return 0.0


def from_full_checkpoint():
    """States of one process, loaded by load_state_dict, are sharded at once."""
    plain, sharded = net(None), fsdp(net(None))
    theirs, ours_ = galore(plain), galore(sharded)
    train(plain, theirs, 3)
    for p, q in zip(sharded.parameters(), plain.parameters(), strict=True):
        overwrite_(p, q.detach())
    ours_.load_state_dict(theirs.state_dict())
    check_stored_in_parts(ours_, next(sharded.parameters()).placements)
    train(plain, theirs, 4)
    train(sharded, ours_, 4)
    return difference(list(sharded.parameters()), ours_, list(plain.parameters()), theirs)


CASES = {
    "techniques": technique_cases,
    "tensor-parallel": tensor_parallel_cases,
    "steps": lambda folder: steps_cases(),
    "save": partial(checkpoint_cases, save),
    "load": partial(checkpoint_cases, load),
}


def main(what, folder):
    rank, folder, found = os.environ["RANK"], Path(folder), {}
    with gloo(folder / f".store.{what}"):
        for name, case in CASES[what](folder / "checkpoints"):
            try:
                found[name] = case()
            except Exception as error:
                found[name] = f"{type(error).__name__}: {error}\n{traceback.format_exc()}"
        (folder / f"{what}.{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
