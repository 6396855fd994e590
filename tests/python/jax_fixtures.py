"""What tests of qmoe_core.jax share: parameters, gradients and a loop that trains."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import qmoe_core.jax as qjax

PERIOD = {"update_freq": 2, "update_start_step": 2, "update_end_step": 8}
STEPS = 12


def parameters(seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    shapes = {"dense": {"kernel": (16, 24), "bias": (24,)}, "out": {"kernel": (24, 8), "bias": (8,)}}
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.normal(size=shape), jnp.float32), shapes, is_leaf=lambda x: isinstance(x, tuple)
    )


def updater(algorithm: str, **settings: Any) -> qjax.BaseUpdater:
    config: dict[str, Any] = {"algorithm": algorithm, "sparsity": 0.7, "dist_type": "uniform", **PERIOD}
    if algorithm == "acdc":
        config = {key: value for key, value in config.items() if key not in PERIOD}
        config |= {"init_dense_steps_end": 2, "final_sparse_steps_start": 9, "cycle_sparse_steps": 2}
        config |= {"cycle_dense_steps": 1}
    if algorithm == "iterative_nm":
        config |= {"sparsity": 0.5, "sparsity_type": "nm_2,4"}
    return qjax.create_updater_from_config(config | settings)


def train(
    pruner: qjax.BaseUpdater, optimizer: Any = None, jit: bool = True, scale: float = 1.0, **extra: Any
) -> tuple[list[Any], Any, Any]:
    """Unpacked masks after every step, parameters and state of the end."""
    wrapped = pruner.wrap_optax(optax.adam(0.05, eps=0.3) if optimizer is None else optimizer)
    params = parameters()
    state, history = wrapped.init(params), []
    update = jax.jit(partial(wrapped.update, **extra)) if jit else partial(wrapped.update, **extra)
    for step in range(STEPS):
        grads = jax.tree.map(lambda leaf: leaf * scale, parameters(step + 1))
        updates, state = update(grads, state, params)
        params = pruner.post_gradient_update(optax.apply_updates(params, updates), state)
        history.append(pruner.unpacked_masks(state, params))
    return history, params, state


def equal(first: Any, second: Any) -> bool:
    leaves = zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True)
    return jax.tree.structure(first) == jax.tree.structure(second) and all(np.array_equal(a, b) for a, b in leaves)


def partitioned() -> Any:
    labels = {"dense": {"kernel": "a", "bias": "b"}, "out": {"kernel": "b", "bias": "a"}}
    return optax.multi_transform({"a": optax.adam(0.05), "b": optax.rmsprop(0.05)}, labels)


OPTIMIZERS = {
    "adamw, clipped": lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.05)),
    "momentum": lambda: optax.sgd(0.05, momentum=0.9),
    "rmsprop": lambda: optax.rmsprop(0.05, momentum=0.9),
    "lion": lambda: optax.lion(0.01),
    "adagrad": lambda: optax.adagrad(0.05),
    "adafactor": lambda: optax.adafactor(0.05, min_dim_size_to_factor=4),
    "scheduled": lambda: optax.adam(optax.cosine_decay_schedule(0.1, 10)),
    "injected": lambda: optax.inject_hyperparams(optax.adam)(learning_rate=0.05),
    "masked": lambda: optax.masked(optax.adam(0.05), {"dense": True, "out": False}),
    "multi_transform": partitioned,
    "accumulating": lambda: optax.MultiSteps(optax.adam(0.05), 2).gradient_transformation(),
}
