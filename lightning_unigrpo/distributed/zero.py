"""DeepSpeed, whose engine wraps the LightningModule and does backward, clipping and step by itself.

Stages 1 and 2 leave the weights whole. Stage 3 cuts each into a part per rank and gathers it by hooks that
its engine puts on every module; a rank that calls a module alone waits for ever. So only the packed pass
goes through those hooks: rollouts and the reference gather by hooks of our own, a unit at a time, whatever
a rank computes in it.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TypeAlias, cast
from weakref import ReferenceType, WeakKeyDictionary, ref

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import DeepSpeedStrategy, Strategy
from lightning.pytorch.strategies.deepspeed import remove_module_hooks
from torch import Tensor, nn

from lightning_unigrpo.distributed.collectives import gather_objects
from lightning_unigrpo.types import Trajectory

Fill: TypeAlias = Callable[[nn.Module, str], None]
KEY = "trainer.strategy.init_args.config"
OLDEST = "0.18.5"
"""The first that can be told between two backwards of one step that the next one adds."""
REFUSED: Mapping[str, str] = {
    "optimizer": "model.optim.text_lr and model.optim.flow_lr would be ignored: the optimizer is made here",
    "scheduler": "the warm-up of model.optim.warmup_steps is the only schedule",
    "gradient_accumulation_steps": "a step's micro-batches are counted here: set "
    "model.optim.micro_batch_size instead",
    "pipeline": "an adapter's network is called as one module, not as stages of a pipeline",
    "tensor_parallel": "adapters have no plan for tensor parallelism",
    "sequence_parallel_size": "adapters have no plan for sequence parallelism",
    "managed_gradient_accumulation": "it must stay true: a step's micro-batches are counted here",
    "amp": "set trainer.precision to bf16-mixed instead",
    "gradient_allreduce_op": "gradients must be averaged over ranks, as they are without it",
}
"""Keys of DeepSpeed's config, and why they may not be given."""


class HasUnits(Protocol):
    """An adapter."""

    net: nn.Module

    def shard_units(self) -> list[nn.Module]:
        """Return the submodules of ``net`` that are gathered one at a time."""


# ---- settings


def stage_of(strategy: Strategy) -> int:
    """Return what is cut into parts: 1 moments, 2 gradients too, 3 weights too; 0 without DeepSpeed."""
    if not isinstance(strategy, DeepSpeedStrategy):
        return 0
    given = (strategy.config or {}).get("zero_optimization")
    return int(given.get("stage", 0)) if isinstance(given, dict) else 0


def settle(strategy: Strategy, max_grad_norm: float | None) -> None:
    """Refuse a config that would train something else, and put into it what DeepSpeed does instead of us.

    Before Lightning completes the config, that is in ``setup``: afterwards a 0 that the user wrote looks
    like one that was left out.

    Args:
        strategy: any; nothing happens unless it is DeepSpeed's.
        max_grad_norm: of ``optim``; ``None`` leaves ``gradient_clipping`` to the config.

    Raises:
        ValueError: naming the key.
    """
    module = strategy.lightning_module
    assert module is not None
    dismiss(module)
    if is_cut(module) and stage_of(strategy) != 3:
        raise ValueError(
            "trainer.strategy is not DeepSpeed's stage 3, but an earlier run with it has left this module's "
            "weights in parts; build the module again."
        )
    if not isinstance(strategy, DeepSpeedStrategy):
        return
    require()
    if strategy._config_initialized:  # a later fit: the config is ours by now
        return
    config = cast(dict[str, Any], strategy.config)
    _check_config(config, str(strategy.precision_plugin.precision))
    # Lightning refuses even the 1 that it puts there.
    config.pop("gradient_accumulation_steps", None)
    clipping = config.setdefault("gradient_clipping", max_grad_norm or 0.0)
    if max_grad_norm is not None and clipping != max_grad_norm:
        raise ValueError(
            f"{KEY}.gradient_clipping is {clipping}, but model.optim.max_grad_norm is {max_grad_norm}: "
            "DeepSpeed clips by itself. Leave gradient_clipping out, or set max_grad_norm to null."
        )
    # Moments in the host's memory: the optimizer is torch's, which DeepSpeed allows when it is told so.
    config.setdefault("zero_force_ds_cpu_optimizer", False)


def _check_config(config: Mapping[str, Any], precision: str) -> None:
    for key, reason in REFUSED.items():
        if key in config and config[key] not in (1, True):
            raise ValueError(f"{KEY}.{key} is {config[key]!r}; leave it out: {reason}.")
    zero = config.get("zero_optimization", {})
    if zero.get("stage", 0) not in (1, 2, 3):
        raise ValueError(
            f"{KEY}.zero_optimization.stage is {zero.get('stage', 0)}; give 1, 2 or 3. Where nothing is to "
            "be cut into parts, set trainer.strategy to ddp."
        )
    for key in ("offload_param", "offload_optimizer"):
        if zero.get(key, {}).get("device") == "nvme":
            raise ValueError(
                f"{KEY}.zero_optimization.{key}.device is nvme, with which nothing was ever run; give cpu."
            )
    for key, begin in (("bf16", "bf16"), ("fp16", "16")):
        if config.get(key, {}).get("enabled") and not precision.startswith(begin):
            raise ValueError(
                f"{KEY}.{key}.enabled is true, but trainer.precision is {precision}. Leave {key} out and set "
                f"trainer.precision to {begin}-mixed."
            )


_ENGINES: WeakKeyDictionary[nn.Module, ReferenceType[Any]] = WeakKeyDictionary()
"""The last engine of each LightningModule."""


def engine_of(strategy: Strategy) -> Any | None:
    """Return the engine; ``None`` where there is none, or not yet."""
    module, engine = strategy.lightning_module, strategy.model
    if not isinstance(strategy, DeepSpeedStrategy) or engine is module or module is None:
        return None
    _ENGINES[module] = ref(engine)
    return engine


def dismiss(module: nn.Module) -> None:
    """Take an earlier run's engine off a module: it would answer to every backward of the next one."""
    engine = _ENGINES.pop(module, lambda: None)()
    if engine is None:
        return
    engine.empty_partition_cache()
    engine.destroy()
    remove_module_hooks(module)
    for part in module.modules():
        for name in ("pre_bwd_fn", "post_bwd_fn"):  # made once per module, for its first engine
            part.__dict__.pop(name, None)


def require() -> None:
    """Ask for a DeepSpeed that can be told, between two backwards of one step, that the next one adds.

    Raises:
        ValueError: when there is none, or an older one.
    """
    try:
        from deepspeed.runtime.base_optimizer import ZeROOptimizer

        fault = "" if hasattr(ZeROOptimizer, "clear_backward_seen_flag") else "an older one is"
    except ImportError:
        fault = "none is"
    if fault:
        raise ValueError(
            f"trainer.strategy is DeepSpeed's, which needs deepspeed >= {OLDEST}, and {fault} installed: "
            'pip install "lightning-unigrpo[deepspeed]".'
        )


# ---- the network, before there is an engine


def check(strategy: Strategy, net: nn.Module) -> None:
    """Refuse weights of another dtype than the engine's, which would not start with them.

    Raises:
        ValueError: naming the keys.
    """
    dtypes = {p.dtype for p in net.parameters() if p.is_floating_point()}
    if dtype_of(strategy) == torch.float32 and dtypes != {torch.float32}:
        raise ValueError(
            "trainer.strategy is DeepSpeed's, which computes in one dtype, float32 with trainer.precision "
            f"32-true, but the adapter's network has {' and '.join(sorted(map(str, dtypes)))}. Set "
            "trainer.precision to bf16-mixed (LoRA then steps in float32 copies), or adapter.dtype to "
            "float32."
        )


def dtype_of(strategy: Strategy) -> torch.dtype:
    """Return the dtype that the engine gives to all weights; it steps in float32 copies."""
    config = cast(dict[str, Any], cast(DeepSpeedStrategy, strategy).config)
    for key, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        if config.get(key, {}).get("enabled"):
            return dtype
    return torch.float32


def convert(net: nn.Module, strategy: Strategy) -> None:
    """Give the weights the engine's dtype, so that copies of them are of the policy that will be trained.

    Args:
        net: may be on the meta device.
        strategy: DeepSpeed's.
    """
    from deepspeed.runtime.zero.partition_parameters import shutdown_init_context

    # In stage 3 Lightning calls configure_model in a context where torch.empty and its like make tensors
    # on the GPU and in the engine's dtype, whatever reads weights expects; nothing here needs it.
    shutdown_init_context()
    for parameter in net.parameters():
        parameter.data = parameter.data.to(dtype_of(strategy))


def shard(net: nn.Module, units: Sequence[nn.Module], strategy: Strategy, fill: Fill) -> nn.Module:
    """Cut the weights into a part per rank, unit by unit; those of rank 0 count.

    Args:
        net: may be on the meta device. Where none of its weights is trained it gets no engine, but gathers
            by hooks of its own.
        units: submodules that are gathered one at a time.
        strategy: DeepSpeed's, of stage 3.
        fill: reads the weights of a unit.

    Returns:
        ``net``.
    """
    import deepspeed

    strategy = cast(DeepSpeedStrategy, strategy)
    is_trained = any(parameter.requires_grad for parameter in net.parameters())
    names = {id(module): name for name, module in net.named_modules()}
    for part in (*units, net):
        name = names[id(part)]
        fill(part, f"{name}." if name else "")
        deepspeed.zero.Init(module=part, config_dict_or_path=strategy.config)
    module = strategy.lightning_module
    assert module is not None
    module.to(strategy.root_device)  # what is no weight: an engine for cut weights moves nothing
    net.to(strategy.root_device)
    if is_trained:
        _OWNERS[net] = ref(module)
    else:
        gather_by_unit(net, units)
    return net


def gather_by_unit(net: nn.Module, units: Sequence[nn.Module]) -> None:
    """Gather the weights of a unit before its forward, and let go of them behind it; for no_grad.

    What lies in no unit, or in several, is there for the whole forward of the network. So ranks that call
    it for different things gather the same.

    Args:
        net: with cut weights, and without an engine.
        units: submodules of it.
    """
    inside = Counter(id(p) for unit in units for p in unit.parameters())
    covered = {id(module) for unit in units for module in unit.modules()}
    outer = [m for m in net.modules() if id(m) not in covered]
    shared = {id(p) for module in outer for p in module.parameters(recurse=False)}
    shared |= {i for i, count in inside.items() if count > 1}
    for unit in units:
        _gather_for(unit, [p for p in unit.parameters() if id(p) not in shared])
    _gather_for(net, [p for p in net.parameters() if id(p) in shared])


def _gather_for(part: nn.Module, parameters: Sequence[nn.Parameter]) -> None:
    import deepspeed

    # One by one: of several together, deepspeed 0.18 waits for the last only, and gloo keeps no order.
    contexts = [deepspeed.zero.GatheredParameters([p]) for p in parameters]

    def enter(*_: object) -> None:
        for context in contexts:
            context.__enter__()

    def leave(*_: object) -> None:
        for context in contexts:
            context.__exit__(None, None, None)

    part.register_forward_pre_hook(enter)
    part.register_forward_hook(leave, always_call=True)


# ---- whole weights


def parameters(
    net: nn.Module, names: Container[str] | None = None, *, writeback: bool = False
) -> Iterator[tuple[str, Tensor]]:
    """Yield parameters in one piece, as :func:`lightning_unigrpo.distributed.whole_parameters` says.

    Args:
        net: with cut weights.
        names: of those that are wanted; ``None`` = all.
        writeback: whether what rank 0 writes into them is kept.
    """
    import deepspeed

    quiet(net)
    for name, parameter in net.named_parameters():
        if names is None or name in names:
            with deepspeed.zero.GatheredParameters(
                [parameter], modifier_rank=0 if writeback else None
            ):
                yield name, parameter


def is_cut(net: nn.Module) -> bool:
    """Whether stage 3 has cut a network's weights."""
    return any(hasattr(parameter, "ds_id") for parameter in net.parameters())


@contextmanager
def unhooked(holder: HasUnits, skeleton: nn.Module) -> Iterator[None]:
    """Let a rollout gather the weights unit by unit, around the engine's hooks.

    Those gather module by module, and the next ones in the order of the step before: ranks that decode
    texts of different lengths would wait for each other.

    Args:
        holder: its ``net`` is replaced meanwhile.
        skeleton: from before the network was cut.
    """
    net, shell = holder.net, copy.deepcopy(skeleton)
    quiet(net)
    own = dict(net.named_parameters(remove_duplicate=False))
    for path, module in shell.named_modules():
        for leaf in [leaf for leaf, value in module._parameters.items() if value is not None]:
            setattr(module, leaf, own[f"{path}.{leaf}".lstrip(".")])
    for name, buffer in net.named_buffers():
        path, _, leaf = name.rpartition(".")
        setattr(shell.get_submodule(path), leaf, buffer)
    holder.net = shell.train(net.training)
    gather_by_unit(shell, holder.shard_units())
    try:
        yield
    finally:
        holder.net = net


_OWNERS: WeakKeyDictionary[nn.Module, ReferenceType[LightningModule]] = WeakKeyDictionary()
"""The LightningModules of networks that an engine gathers."""
_HOOKS: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()
"""The first of the hooks that :func:`quiet` has put on a network."""


def quiet(net: nn.Module) -> None:
    """End what the engine gathers outside the network's own forward; what was gathered is cut again.

    The whole training step is the engine's forward. It fetches what the last step used first, and any
    weight that is looked at: an adapter that asks a weight for its device would call the other ranks.

    Args:
        net: with cut weights; nothing happens where there is no engine yet.
    """
    owner = _OWNERS.get(net, lambda: None)()
    engine = engine_of(owner.trainer.strategy) if owner is not None else None
    if engine is None:
        return
    engine.optimizer.empty_partition_cache()  # the engine's own method collects garbage, for a second

    def look(does_gather: bool) -> None:
        for module in net.modules():
            if hasattr(module._parameters, "_in_forward"):
                module._parameters._in_forward = does_gather

    look(False)
    known = _HOOKS.get(net)
    # Between runs all hooks are removed, here and by Lightning.
    if known is None or known.id not in net._forward_pre_hooks:
        _HOOKS[net] = net.register_forward_pre_hook(lambda *_: look(True))
        net.register_forward_hook(lambda *_: look(False), always_call=True)
        engine.module.register_forward_pre_hook(lambda *_: quiet(net))


@torch.no_grad()
def copy_weights(source: nn.Module, target: nn.Module) -> None:
    """Copy one network's weights into another, weight by weight."""
    import deepspeed

    old = dict(target.named_parameters())
    for name, new in parameters(source):
        with deepspeed.zero.GatheredParameters([old[name]], modifier_rank=0):
            old[name].copy_(new)


# ---- the engine


def require_alike(strategy: Strategy, trajectories: Sequence[Trajectory]) -> None:
    """Refuse a packed pass that calls other modules than those of other ranks, before all wait for ever.

    Args:
        strategy: any; nothing happens unless weights are gathered module by module.
        trajectories: of this rank's pass.

    Raises:
        ValueError: on every rank.
    """
    if stage_of(strategy) != 3:
        return
    kinds = sorted({type(s).__name__ for t in trajectories for s in t.segments})
    found = [" and ".join(cast(list[str], each)) for each in gather_objects(kinds)]
    if len(set(found)) > 1:
        raise ValueError(
            "trainer.strategy is DeepSpeed's stage 3, which gathers the weights of the modules that a rank "
            f"calls, so all must call the same; but their micro-batches hold {', '.join(found)}. Give all "
            "prompts input images or none, or set trainer.strategy to fsdp or deepspeed_stage_2."
        )


@contextmanager
def accumulate(strategy: Strategy, *, is_last: bool) -> Iterator[None]:
    """Let a backward add to those before it in the same optimizer step.

    The engine counts backwards by its own forward, which is one training step here: without a word it
    would keep the last backward's gradients only.

    Args:
        strategy: DeepSpeed's.
        is_last: whether the step follows.
    """
    engine = cast(Any, engine_of(strategy))
    engine.set_gradient_accumulation_boundary(is_last)
    engine.optimizer.clear_backward_seen_flag()
    yield


def norms(strategy: Strategy) -> dict[str, float]:
    """Return the norm of all gradients together before clipping, where an engine clips; after the step.

    Args:
        strategy: any; nothing without an engine.
    """
    engine = engine_of(strategy)
    norm = engine.get_global_grad_norm() if engine is not None else None
    return {} if norm is None else {"global": float(norm)}
