"""Signs in GaLore's subspace: the method that 08_your_own_method.ipynb adds to the library."""

from typing import ClassVar

from lowrank_lab.optim import ProjectedAdamW
from lowrank_lab.optim.projection import get_projections, project, project_back_add_


class SignGaLore(ProjectedAdamW):
    """W ← W − lr · scale · P sign(β₁m + (1−β₁)R), with R = Pᵀ G and m an average of R."""

    group_defaults: ClassVar = {
        "update_proj_gap": 100, "scale": 1.0, "proj_type": "std", "refresh": "svd",
    }  # fmt: skip

    def update_(self, W, G, state, group, step_size):
        left, right = get_projections(self, state, G, group)
        R = project(G, left, right)
        beta1, beta2 = group["betas"]
        m = state.setdefault("exp_avg", R.new_zeros(R.shape))
        direction = m.lerp(R, 1 - beta1).sign_()
        m.lerp_(R, 1 - beta2)
        project_back_add_(W, direction, left, right, alpha=-group["lr"] * group["scale"])


def build(targets, rest, config):
    """The optimizer of a run: the target matrices have a rank, all other weights get AdamW."""
    options = config.method_options
    keys = {name: options[name] for name in ("update_proj_gap", "scale")}
    ranked = {"params": targets, "rank": config.rank, **keys}
    return SignGaLore([ranked, {"params": rest}], lr=config.lr, betas=(0.9, 0.99))
