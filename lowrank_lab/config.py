"""A run is one frozen, validated value: `RunConfig`, and the model sizes it can name.

What can be checked without looking at a method or a corpus is checked here; `methods.resolve`
checks the rest, fills in what was left `None` and returns a `ResolvedConfig`. Every refusal is an
`InputError`: one line that names the field, its value and what is allowed.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import re
import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

# Attention and MLP projections; embeddings, norms and the LM head always stay full rank.
TARGETS = r"\.(q|k|v|o|gate|up|down)_proj$"
EXPONENT = re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+")
ALL_LINEAR = "all-linear"  # a target: every linear layer but the head


class InputError(ValueError):
    """Wrong input: one line that names the field, its value and what is allowed."""

    def __init__(self, field: str, value: object, allowed: str) -> None:
        shown = repr(value)
        if len(shown) > 80:  # the end of a path says more than its middle
            shown = f"{shown[:30]}…{shown[-49:]}"
        super().__init__(" ".join(f"{field}: {shown} is not allowed; {allowed}".split()))
        self.field, self.value, self.allowed = field, value, allowed

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.field, self.value, self.allowed)


def check_utf8(field: str, value: str) -> None:
    """Refuse text that no record can keep: a file's name may be any bytes."""
    if not value.isascii() and any("\ud800" <= c <= "\udfff" for c in value):
        raise InputError(field, value, "it is not UTF-8")


def nearest(name: object, known: Iterable[str]) -> str:
    """What to say about an unknown name: the nearest known one, or all of them."""
    known = sorted(known)
    close = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"


class Size(NamedTuple):
    """Dimensions of a LLaMA model (2505.22922, Table 2 and the sizes its code ships)."""

    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_layers: int
    vocab_size: int = 32000  # with `byte`: 256 and an end-of-text token


SIZES = {
    "tiny": Size(32, 88, 2, 2, 512),
    "micro": Size(64, 176, 2, 4, 1024),
    "mini": Size(128, 352, 4, 4, 2048),
    "9m": Size(128, 352, 4, 4),
    "20m": Size(256, 688, 4, 4),
    "35m": Size(384, 1024, 8, 6),
    "60m": Size(512, 1376, 8, 8),
    "130m": Size(768, 2048, 12, 12),
    "250m": Size(768, 2560, 16, 24),
    "350m": Size(1024, 2736, 16, 24),
    "1b": Size(2048, 5461, 32, 24),
    "3b": Size(2560, 6848, 32, 32),
    "7b": Size(4096, 11008, 32, 32),
    "13b": Size(5120, 13824, 40, 40),
}

# Fields that change what is recorded or how a run is executed, but not what is trained.
NOT_IN_RUN_ID = frozenset(
    {"checkpoint_every", "keep_latest", "keep_after_finish", "device", "parallel"}
)

# Values of method options that a run id counts as another one: earlier versions had only that.
COUNTED_AS = {"refresh": {"auto": "svd"}}
# Options that earlier versions lacked, with the values that do what these versions did: a run id
# leaves them out.
NOT_COUNTED = {"on_refresh": ("keep", "published")}


def counted_options(options: dict[str, Any]) -> dict[str, Any]:
    """Options of a method, without those that do what runs of earlier versions did."""
    return {n: v for n, v in options.items() if v not in NOT_COUNTED.get(n, ())}


# Fields by the names that they had in earlier versions.
RENAMED = {"checkpoints_kept": "keep_latest", "keep_checkpoints": "keep_after_finish"}
# Defaults of earlier versions, where they were others: a record without the field has this value,
# and run ids leave it out.
FORMER_DEFAULTS = {"eval_windows": "first"}
_warned: set[str] = set()


def warn_renamed(old: str, new: str) -> None:
    """Say, once per process, that something that a person wrote has a new name."""
    if old not in _warned:
        _warned.add(old)
        warnings.warn(f"{old} is called {new} now", FutureWarning, stacklevel=4)


def help_field(default: Any, text: str, **limits: Any) -> Any:
    """A field with its one-line help, which the command line and the README show."""
    if any(key in limits for key in ("gt", "ge", "lt", "le")):
        limits.setdefault("allow_inf_nan", False)
    return Field(default, description=text, **limits)


class RunConfig(BaseModel):
    """Everything that decides a run. Frozen; `replace` makes a variant.

    Fields left `None` are filled by `methods.resolve` from the method's defaults and the corpus.
    Learning rates are absolute, periods are in optimizer steps.

    Raises:
        InputError: a field is unknown or its value is not allowed.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    # model
    model: str = help_field("micro", "named size: " + " ".join(SIZES))
    hidden_size: int | None = help_field(None, "overrides the width of the size", ge=2, le=65536)
    intermediate_size: int | None = help_field(None, "overrides the MLP width", ge=1, le=262144)
    num_heads: int | None = help_field(None, "overrides the number of heads", ge=1, le=1024)
    num_layers: int | None = help_field(None, "overrides the number of layers", ge=1, le=1024)
    initializer_range: float = help_field(0.02, "std of dense initial weights", gt=0, le=10)
    # data
    corpus: str = help_field("python", "python | markov | text:PATH | c4:PATH | hub:NAME")
    tokenizer: str | None = help_field(
        None, "a tokenizer.json; default: a BPE trained on the corpus"
    )
    vocab_size: int | Literal["byte"] | None = help_field(
        None, "BPE vocabulary (markov: alphabet), or byte; default: the size's"
    )
    sequence_length: int = help_field(256, "tokens per sequence", ge=2, le=1 << 20)
    batch: int = help_field(16, "sequences per optimizer step", ge=1, le=1 << 20)
    gradient_accumulation: int = help_field(1, "micro-batches per optimizer step", ge=1, le=1 << 20)
    steps: int | None = help_field(
        None, "optimizer steps (200 if tokens isn't given)", ge=1, le=1 << 50
    )
    tokens: int | None = help_field(None, "training tokens, instead of steps", ge=1, le=1 << 60)
    repeat: bool = help_field(False, "allow more than one pass over the corpus")
    # method
    method: str = help_field("full-rank", "see `lowrank-lab methods`")
    rank: int | None = help_field(
        None, "rank r; default: a quarter of the hidden size", ge=1, le=1 << 50
    )
    init: Literal["kaiming", "spectral"] | None = help_field(None, "initialisation of the factors")
    target: str = help_field(
        TARGETS, "regular expression of the layers to apply the method to, or all-linear"
    )
    method_options: dict[str, Any] = help_field({}, "options of the method, by name")
    refactor_every: int = help_field(0, "refactorization period, 0 = never", ge=0, le=1 << 50)
    reset_every: int = help_field(0, "momentum reset period, 0 = never", ge=0, le=1 << 50)
    reset_strength: float = help_field(1.0, "share of the moments that a reset removes", ge=0, le=1)
    reset_how: Literal["scale", "magnitude", "random"] = help_field(
        "scale", "scale the moments, or prune their smallest or random entries"
    )
    reset_moments: Literal["both", "exp_avg", "exp_avg_sq"] = help_field(
        "both", "which of Adam's averages a reset acts on"
    )
    reset_params: Literal["targets", "all"] = help_field(
        "targets", "reset the moments of the target layers, or of all weights"
    )
    on_refactor: Literal["keep", "reset", "transport"] = help_field(
        "keep", "what a refactorization does to the factors' moments"
    )
    refactor_basis: Literal["singular", "nearest"] = help_field(
        "singular", "balanced factors: diagonal (singular), or of minimal rotation (nearest)"
    )
    refactor_above: float = help_field(
        0.0, "refactorize only layers with a higher imbalance of factors", ge=0, lt=1
    )
    recovery_steps: int = help_field(
        10, "steps in which the learning rate recovers", ge=0, le=1 << 50
    )
    # optimisation
    lr: float | None = help_field(
        None, "peak learning rate; default: the method's at this width", gt=0, le=100
    )
    rest_lr: float | None = help_field(
        None,
        "peak learning rate of what is no target: embedding, head, norms; default: lr if given,"
        " else the method's at this width",
        gt=0,
        le=100,
    )
    warmup: float = help_field(
        0.1, "share of the steps for warm-up, below 1; or its steps, from 2", ge=0, le=1 << 50
    )
    schedule: Literal["cosine", "linear", "constant"] = help_field("cosine", "decay after warm-up")
    min_lr_ratio: float = help_field(0.1, "final learning rate / peak", ge=0, le=1)
    optimizer: str | None = help_field(None, "optimizer instead of AdamW, as module.Class")
    optimizer_options: dict[str, Any] = help_field({}, "keyword arguments of that optimizer")
    per_layer: bool = help_field(False, "update each weight during the backward pass; needs clip 0")
    weight_decay: float = help_field(0.0, "decoupled weight decay", ge=0, le=10)
    clip: float = help_field(1.0, "largest global gradient norm, 0 = no clipping", ge=0)
    on_nonfinite: Literal["stop", "skip"] = help_field(
        "stop", "stop at a loss or gradient of inf or NaN, or skip that update"
    )
    # execution
    precision: Literal["fp32", "bf16", "amp-bf16"] = help_field("fp32", "weights and compute dtype")
    state_precision: Literal["same", "fp32", "8bit"] = help_field(
        "same", "moments: in the weights' dtype, fp32 (projected optimizers), or blocks of 8 bits"
    )
    stochastic_rounding: bool = help_field(
        False, "round bf16 weights stochastically (projected optimizers)"
    )
    compile: bool = help_field(
        False, "torch.compile blocks, loss, CUDA optimizers (needs a C++ compiler)"
    )
    activation_checkpointing: bool = help_field(False, "recompute blocks in the backward pass")
    seed: int = help_field(0, "of initial weights and batch order", ge=0, lt=1 << 32)
    device: Literal["auto", "cpu", "cuda"] = help_field("auto", "auto: CUDA where there is one")
    parallel: Literal["ddp", "fsdp2"] = help_field(
        "ddp", "under torchrun: replicated models (ddp), or sharded weights and states (fsdp2)"
    )
    # records
    eval_every: int | None = help_field(
        None, "steps between evaluations; default steps/10", ge=1, le=1 << 50
    )
    eval_tokens: int = help_field(65536, "tokens per evaluation", ge=2, le=1 << 50)
    test_tokens: int = help_field(262144, "tokens per final evaluation", ge=2, le=1 << 50)
    eval_windows: Literal["first", "spread"] = help_field(
        "spread", "windows to evaluate: those a split begins with, or spread over all of it"
    )
    spectra_every: int | None = help_field(
        None, "steps between spectra; default steps/5", ge=1, le=1 << 50
    )
    spectra_layers: str = help_field(
        TARGETS, "regular expression of the layers to record spectra of"
    )
    checkpoint_every: int | None = help_field(
        None, "steps between checkpoints; default steps/10", ge=1, le=1 << 50
    )
    keep_latest: int = help_field(
        2, "newest checkpoints that are kept, beside the best one", ge=1, le=1 << 20
    )
    keep_after_finish: bool = help_field(False, "keep checkpoints when the run has finished")

    def __init__(self, /, **values: Any) -> None:
        values = self._with_new_names(values)
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise _as_input_error(error, values) from None

    @classmethod
    def _with_new_names(cls, values: dict[str, Any]) -> dict[str, Any]:
        """The values by today's names of their fields; records have old names without a warning."""
        for old, new in RENAMED.items():
            if old not in values:
                continue
            if new in values:
                raise InputError(
                    old, values[old], f"it is called {new} now, which is given as well"
                )
            if not issubclass(cls, ResolvedConfig):
                warn_renamed(old, new)
            values = {**values, new: values[old]}
            del values[old]
        return values

    @field_validator("target")
    @classmethod
    def _all_linear(cls, target: str) -> str:
        """All linear layers of the model here, without the head, are those that TARGETS matches."""
        return TARGETS if target == ALL_LINEAR else target

    @model_validator(mode="before")
    @classmethod
    def _no_booleans_as_numbers(cls, values: dict[str, Any]) -> dict[str, Any]:
        for name, value in values.items():
            field = cls.model_fields.get(name)
            if isinstance(value, bool) and field is not None and field.annotation is not bool:
                raise InputError(name, value, "must be a number or a name, not true or false")
        return values

    @model_validator(mode="before")
    @classmethod
    def _numbers_with_exponents(cls, values: dict[str, Any]) -> dict[str, Any]:
        """`4e6` as a number wherever one is meant: YAML 1.1 and a command line give it as text."""
        for name, value in values.items():
            if isinstance(value, str):
                check_utf8(name, value)
        texts = {n for n, f in cls.model_fields.items() if f.annotation in (str, str | None)}
        return {n: v if n in texts else _number(v) for n, v in values.items()}

    @model_validator(mode="after")
    def _fields_agree(self) -> RunConfig:
        if self.model not in SIZES:
            raise InputError("model", self.model, nearest(self.model, SIZES))
        if self.steps is not None and self.tokens is not None:
            raise InputError("tokens", self.tokens, "give steps or tokens, not both")
        if isinstance(self.vocab_size, int) and not 2 <= self.vocab_size <= 65536:
            raise InputError("vocab_size", self.vocab_size, "must be from 2 to 65536, or byte")
        if self.tokenizer is not None and self.vocab_size == "byte":
            raise InputError("tokenizer", self.tokenizer, "vocab_size byte has its own")
        if self.tokenizer is not None and self.corpus == "markov":
            raise InputError("tokenizer", self.tokenizer, "markov is numbers, not text")
        if self.batch % self.gradient_accumulation:
            raise InputError(
                "gradient_accumulation",
                self.gradient_accumulation,
                f"must divide batch {self.batch}",
            )
        if self.tokens is not None and self.tokens < self.tokens_per_step:
            raise InputError("tokens", self.tokens, f"one step is {self.tokens_per_step} tokens")
        size = self.size
        if size.hidden_size % (2 * size.num_heads):
            raise InputError(
                "num_heads", size.num_heads, f"twice it must divide {size.hidden_size}"
            )
        for name in ("target", "spectra_layers"):
            try:
                re.compile(getattr(self, name))
            except (re.error, OverflowError, RecursionError) as error:
                raise InputError(
                    name, getattr(self, name), f"not a regular expression: {error}"
                ) from None
        if self.per_layer and self.on_nonfinite == "skip":
            allowed = "with per_layer weights change before their step is known to be finite; stop"
            raise InputError("on_nonfinite", "skip", allowed)
        self._check_periods()
        return self

    def _check_periods(self) -> None:
        total = self.total_steps
        if self.warmup >= 1 and (self.warmup < 2 or self.warmup % 1 or self.warmup >= total):
            allowed = f"a share of the steps below 1, or whole steps from 2 to below {total}"
            raise InputError("warmup", self.warmup, allowed)
        for name in ("refactor_every", "reset_every"):
            if getattr(self, name) >= total:
                allowed = f"must be below the {total} steps of the run, or 0 for never"
                raise InputError(name, getattr(self, name), allowed)
        if self.recovery_steps == 1:
            raise InputError("recovery_steps", 1, "must be 0 (no recovery) or at least 2")
        if self.reset_every and self.recovery_steps > self.reset_every:
            longest = self.reset_every if self.reset_every > 1 else 0
            allowed = (
                f"at most reset_every {self.reset_every}: recovery_steps {longest}, or reset_every "
                f"{self.recovery_steps}, is allowed"
            )
            raise InputError("recovery_steps", self.recovery_steps, allowed)
        both = math.lcm(self.refactor_every, self.reset_every) if self.reset_every else 0
        restarts = self.reset_strength == 1 and self.reset_how == "scale"
        if self.on_refactor == "transport" and 0 < both < total and restarts:
            allowed = f"a full reset at step {both} would undo it; use keep, or a lower strength"
            raise InputError("on_refactor", "transport", allowed)

    @property
    def size(self) -> Size:
        """The named size with the dimensions that were given explicitly."""
        named = SIZES[self.model]
        names = ("hidden_size", "intermediate_size", "num_heads", "num_layers")
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        if self.vocab_size is not None:
            given["vocab_size"] = 257 if self.vocab_size == "byte" else self.vocab_size
        return named._replace(**given)

    @property
    def tokens_per_step(self) -> int:
        return self.batch * self.sequence_length

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the run: `steps`, or as many as fit into `tokens`, or 200."""
        if self.tokens is not None:
            return self.tokens // self.tokens_per_step
        return self.steps if self.steps is not None else 200

    @property
    def warmup_steps(self) -> int:
        """Steps of the warm-up: `warmup`, or that share of all steps."""
        if self.warmup >= 1:
            return int(self.warmup)
        return math.ceil(round(self.warmup * self.total_steps, 6))  # 0.07 · 100 is 7, not 8

    def cadence(self, name: Literal["eval_every", "spectra_every", "checkpoint_every"]) -> int:
        """Steps between two records, with the default that follows the run's length."""
        share = 5 if name == "spectra_every" else 10
        given: int | None = getattr(self, name)
        return given if given is not None else max(1, self.total_steps // share)

    def replace(self, **changes: Any) -> RunConfig:
        """This configuration with some fields changed, validated again and not yet resolved."""
        return RunConfig(**{**self.model_dump(), **changes})

    @property
    def run_id(self) -> str:
        """A readable slug and a hash of everything that decides the result.

        Take it from a resolved configuration: there, fields that the method doesn't use are `None`.
        """
        # Fields at their first default are left out: no id changes with a new field or default.
        defaults = {name: field.default for name, field in RunConfig.model_fields.items()}
        defaults |= FORMER_DEFAULTS
        used = {k: v for k, v in self.model_dump().items() if v != defaults[k]}
        used = {k: v for k, v in used.items() if k not in {*NOT_IN_RUN_ID, "method_options"}}
        used |= {"steps": self.total_steps, "tokens": None}
        options = counted_options(self.method_options)
        for name, counted in COUNTED_AS.items():
            given = options.get(name)
            if isinstance(given, str) and given in counted:
                options[name] = counted[given]
        if options:
            used["method_options"] = options
        digest = hashlib.sha256(json.dumps(used, sort_keys=True).encode()).hexdigest()[:10]
        parts = [self.model, self.method]
        parts += [f"r{self.rank}"] if self.rank else []
        parts += [f"refactor{self.refactor_every}"] if self.refactor_every else []
        parts += [f"reset{self.reset_every}"] if self.reset_every else []
        parts += [f"lr{self.lr:g}"] if self.lr else []
        return "-".join([*parts, f"s{self.seed}", digest])


# Fields that a person may leave `None`, and that are never `None` in a resolved configuration.
FILLED = ("vocab_size", "steps", "lr", "eval_every", "spectra_every", "checkpoint_every")


class ResolvedConfig(RunConfig):
    """A configuration with nothing left to fill in: what `methods.resolve` returns and runs keep.

    Functions that build, train or count take this type and never resolve; `lab.train`,
    `lab.simulate_memory`, studies and the command line resolve once. `replace` returns a
    `RunConfig`, which has to be resolved again, as defaults follow from other fields.

    Raises:
        InputError: as `RunConfig`; also a field of FILLED that is `None`.
    """

    if TYPE_CHECKING:  # narrower than RunConfig's, which `_nothing_is_missing` guarantees
        vocab_size: int | Literal["byte"]
        steps: int
        lr: float
        eval_every: int
        spectra_every: int
        checkpoint_every: int

    @model_validator(mode="before")
    @classmethod
    def _fill_former_defaults(cls, values: dict[str, Any]) -> dict[str, Any]:
        return {**FORMER_DEFAULTS, **values}

    @model_validator(mode="after")
    def _nothing_is_missing(self) -> ResolvedConfig:
        for name in FILLED:
            if getattr(self, name) is None:
                raise InputError(name, None, "a resolved configuration has a value for it")
        return self

    @property
    def method_rank(self) -> int:
        """The rank of a method that has one.

        Raises:
            ValueError: the method has no rank.
        """
        if self.rank is None:
            raise ValueError(f"rank: {self.method} has none")
        return self.rank

    def override(self, **changes: Any) -> ResolvedConfig:
        """Other values for fields that no default follows from; all others stay as they are."""
        return ResolvedConfig(**{**self.model_dump(), **changes})


def _number(value: Any) -> Any:
    """Text such as `4e6` as a number, in the values of a mapping too; anything else as it is."""
    if isinstance(value, dict):
        return {name: _number(inner) for name, inner in value.items()}
    return float(value) if isinstance(value, str) and EXPONENT.fullmatch(value) else value


def _as_input_error(error: ValidationError, values: dict[str, Any]) -> InputError:
    """The first of pydantic's complaints, in one line of ours."""
    first = error.errors()[0]
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, InputError):
        return cause
    field = str(first["loc"][0]) if first["loc"] else "config"
    value = values.get(field)
    if first["type"] == "extra_forbidden":
        return InputError(field, value, f"no such field; {nearest(field, RunConfig.model_fields)}")
    return InputError(field, value, first["msg"].replace("Input should", "must"))
