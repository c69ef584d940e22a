"""Rules about settings of several groups together.

Each raises an error of one line with both settings and the way out.
"""

from typing import Any

from revnet._units import nearest_multiples


def check_combinations(config: Any) -> None:
    """Raise unless the shared settings of a run go together.

    Raises:
        ValueError: Two settings exclude each other, or one needs another.
    """
    _check_validation(config)
    _check_arithmetic(config)
    _check_compile(config)
    _check_cuda_graphs(config)
    _check_step_in_backward(config)
    _check_sharding(config)
    if config.batch_size % config.accumulate:
        nearest = nearest_multiples(config.batch_size, config.accumulate)
        raise ValueError(
            f"`batch_size` (={config.batch_size}) must be a multiple of `accumulate` (={config.accumulate}), so that "
            f"all parts weigh the same; pass {nearest}, or another number of parts."
        )
    if config.accumulate > 1 and config.memory_budget is not None:
        raise ValueError(
            f"`accumulate` (={config.accumulate}) keeps the gradients of earlier parts, which a `memory_budget` "
            f"(={config.memory_budget!r}) does not count; leave one of the two out, or pass a `policy`."
        )
    if config.ema_decay is not None and config.memory_budget is not None:
        raise ValueError(
            f"`ema_decay` (={config.ema_decay}) keeps a second copy of the weights, which a `memory_budget` "
            f"(={config.memory_budget!r}) does not count; leave one of the two out, or pass a `policy`."
        )


def _check_validation(config: Any) -> None:
    if config.val_fraction > 0:
        return
    for name in ("val_every", "patience"):
        if getattr(config, name) is not None:
            raise ValueError(
                f"`{name}` (={getattr(config, name)}) needs a validation, and `val_fraction` (=0) holds out nothing; "
                "pass a `val_fraction` of 0.1, or leave it out."
            )
    if config.schedule == "plateau":
        raise ValueError(
            "`schedule` (='plateau') needs a validation, and `val_fraction` (=0) holds out nothing; pass a "
            "`val_fraction` of 0.1, or the schedule cosine."
        )


def _check_arithmetic(config: Any) -> None:
    if config.precision == "bf16-true" and config.ema_decay is not None:
        raise ValueError(
            f"`ema_decay` (={config.ema_decay}) does not go with the `precision` bf16-true, which rounds the small "
            "steps of an average away; pass bf16-mixed, or leave it out."
        )


def _check_step_in_backward(config: Any) -> None:
    if not config.step_in_backward:
        return
    reasons = {
        "accumulate": (config.accumulate > 1, "needs the gradients of all parts", "1"),
        "max_grad_norm": (config.max_grad_norm is not None, "needs all gradients at once", "null"),
        "precision": (config.precision == "16-mixed", "checks all gradients before an update", "bf16-mixed"),
    }
    for name, (is_excluded, reason, way_out) in reasons.items():
        if is_excluded:
            raise ValueError(
                f"`step_in_backward` (=True) does not go with `{name}` (={getattr(config, name)}), which {reason}; "
                f"pass {way_out}, or leave `step_in_backward` out."
            )


def _check_compile(config: Any) -> None:
    if config.compile == "off":
        return
    reasons = {"memory_budget": "counts the memory of an uncompiled network; leave one out"}
    if config.compile == "model":
        way_out = "pass 'functions', or leave one out"
        reasons["tolerance"] = f"places keyframes while the network runs; {way_out}"
        reasons["drift_every"] = f"measures a network that is not one graph; {way_out}"
    for name, reason in reasons.items():
        value = getattr(config, name, None)
        if value is not None:
            raise ValueError(f"`compile` (={config.compile!r}) does not go with `{name}` (={value}), which {reason}.")


def _check_cuda_graphs(config: Any) -> None:
    if not config.cuda_graphs:
        return
    start_size = getattr(config, "start_size", None)
    reasons = {
        "device": (config.device not in ("auto", "cuda"), "has none", "pass cuda"),
        "devices": (config.devices not in (None, 1, "auto"), "needs a process for each", "pass 1"),
        "accumulate": (config.accumulate > 1, "adds up gradients", "pass 1"),
        "precision": (config.precision == "16-mixed", "scales the loss by a changing factor", "pass bf16-mixed"),
        "step_in_backward": (config.step_in_backward, "updates during the backward pass", "leave one out"),
        "compile": (config.compile != "off", "runs compiled code", "leave one out"),
        "memory_budget": (config.memory_budget is not None, "counts the memory without graphs", "leave one out"),
        "start_size": (start_size is not None, "changes the size of images", "leave one out"),
        "tolerance": (getattr(config, "tolerance", None) is not None, "measures errors", "leave one out"),
        "drift_every": (getattr(config, "drift_every", None) is not None, "measures errors", "leave one out"),
    }
    for name, (is_excluded, reason, way_out) in reasons.items():
        if is_excluded:
            value = getattr(config, name)
            raise ValueError(f"`cuda_graphs` (=True) does not go with `{name}` (={value}), which {reason}; {way_out}.")


def _check_sharding(config: Any) -> None:
    if config.strategy != "fsdp2":
        return
    excluded = {
        "ema_decay": config.ema_decay is not None,
        "optimizer": config.optimizer in ("muon", "adafactor", "rprop"),
        "precision": config.precision in ("16-mixed", "bf16-true"),
    }
    for name, is_excluded in excluded.items():
        if is_excluded:
            raise ValueError(
                f"`{name}` (={getattr(config, name)}) does not go with the `strategy` fsdp2, which divides every "
                "parameter; pass ddp, or another value."
            )
    tolerance = getattr(config, "tolerance", None)
    if tolerance is not None:
        raise ValueError(
            f"`tolerance` (={tolerance}) does not go with the `strategy` fsdp2, since each process computes other "
            "blocks again, whose parameters would have to be gathered; pass ddp, or `exact` without a tolerance."
        )
