"""What both JaxPruner and qmoe_core.jax do with the same inputs, by the same calls.

    python tests/python/jax_scenarios.py tests/golden/jax/jaxpruner.npz

records the former, from a clone of github.com/google-research/jaxpruner on PYTHONPATH (an installed one lacks the
extensions), with jax 0.4.30, optax 0.2.3 and flax 0.8.5; tests compare the latter with the recording, and with the
former itself where they find it.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

SPARSITIES = (0.0, 0.1, 0.5, 0.77, 0.9375, 1.0)
STEPS = 14
COMMON = {"dist_type": "uniform", "sparsity": 0.7, "update_freq": 2, "update_start_step": 2, "update_end_step": 10}
CONFIGS: dict[str, dict[str, Any]] = {
    "magnitude": COMMON,
    "magnitude erk": COMMON | {"dist_type": "erk"},
    "magnitude packed": COMMON | {"use_packed_masks": True},
    "magnitude 2:4": COMMON | {"sparsity_type": "nm_2,4"},
    "magnitude 1:8": COMMON | {"sparsity_type": "nm_1,8"},
    "magnitude block": COMMON | {"sparsity_type": "block_4,2"},
    "magnitude channel": COMMON | {"sparsity_type": "channel_0"},
    "magnitude one-shot": COMMON | {"update_end_step": 2},
    "magnitude skip": COMMON | {"skip_gradients": True},
    "magnitude sparse gradients": COMMON | {"is_sparse_gradients": True},
    "saliency": COMMON,
    "random": COMMON,
    "global_magnitude": COMMON,
    "global_magnitude raw": COMMON | {"use_normalization": False},
    "global_saliency": COMMON,
    "static_sparse": COMMON,
    "static_sparse 2:4": COMMON | {"sparsity_type": "nm_2,4"},
    "set": COMMON | {"drop_fraction": 0.4},
    "rigl": COMMON | {"drop_fraction": 0.4},
    "rigl erk": COMMON | {"dist_type": "erk", "drop_fraction": 0.3},
    "magnitude_ste": COMMON,
    "random_ste": COMMON,
    "no_prune": {},
}
PHASES = {"init_dense_steps_end": 2, "final_sparse_steps_start": 9, "cycle_sparse_steps": 2, "cycle_dense_steps": 1}
EXTENSIONS: dict[str, dict[str, Any]] = {
    "acdc": {"dist_type": "erk", "sparsity": 0.7, **PHASES},
    "adam-fisher": COMMON,
    "adam-fisher reset": COMMON | {"reset_adam": True},
}


def parts(lib: Any) -> tuple[Any, Any, Any]:
    """Where a library has its types, mask functions and distributions."""
    if lib.__name__ == "jaxpruner":
        from jaxpruner import mask_calculator, sparsity_distributions, sparsity_types

        return sparsity_types, mask_calculator, sparsity_distributions
    return lib, lib, lib


def scores() -> Iterator[tuple[str, np.ndarray]]:
    """Scores with and without ties, in several shapes."""
    rng = np.random.default_rng(0)
    for shape in ((64,), (16, 24), (7, 11), (3, 3, 8, 16)):
        name = "x".join(map(str, shape))
        yield f"normal {name}", np.abs(rng.normal(size=shape)).astype(np.float32)
        yield f"signed {name}", rng.normal(size=shape).astype(np.float32)
        yield f"ties {name}", rng.integers(0, 4, shape).astype(np.float32)
        yield f"zeros {name}", np.zeros(shape, np.float32)
    yield "whole numbers", rng.integers(-3, 4, (16, 24)).astype(np.int32)


def masks(lib: Any) -> Iterator[tuple[str, Any]]:
    types, calculator, _ = parts(lib)
    kinds = {
        "unstructured": types.Unstructured(),
        "2:4": types.NByM(2, 4),
        "1:8": types.NByM(1, 8),
        "3:16": types.NByM(3, 16),
        "2:4 axis 0": types.NByM(2, 4, 0),
        "block 4x2": types.Block((4, 2)),
        "block 4x2 max": types.Block((4, 2), use_avg_pooling=False),
        "block 2x8": types.Block((2, 8)),
        "channel 0": types.Channel(0),
        "channel -1": types.Channel(-1),
    }
    for name, array in scores():
        for kind, sparsity_type in kinds.items():
            if not fits(kind, array):
                continue
            topk = calculator.get_topk_fn(sparsity_type)
            for sparsity in SPARSITIES:
                yield f"mask {name} {kind} {sparsity}", topk(jnp.asarray(array), sparsity)
    half = jnp.asarray(np.random.default_rng(1).normal(size=(32, 32)), jnp.bfloat16)
    for sparsity in SPARSITIES:
        yield f"mask bfloat16 {sparsity}", calculator.get_topk_fn(types.Unstructured())(half, sparsity)


def fits(kind: str, array: np.ndarray) -> bool:
    """Whether JaxPruner takes this type for these scores, without its errors at ragged ends and with whole numbers."""
    if kind.startswith("block"):
        height, width = map(int, kind.split()[1].split("x"))
        ends = zip(array.shape[:2], (height, width), strict=False)
        return array.ndim > 1 and array.dtype == np.float32 and all(n % side in (0, *range(-(-side // 2), side))
                                                                    for n, side in ends)  # fmt: skip
    if ":" in kind:
        group = int(kind.split()[0].split(":")[1])
        return array.shape[0 if kind.endswith("axis 0") else -1] % group == 0
    return array.ndim > 1 or kind == "unstructured"


def schedules(lib: Any) -> Iterator[tuple[str, Any]]:
    targets = {"a": 0.8, "b": None, "c": 0.0}
    for arguments in ((1, 0, 10), (5, 3, 33), (7, 20, 21), (10, 100, 1000)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            schedule = lib.PolynomialSchedule(*arguments)
        steps = range(0, arguments[2] + 20, max(1, arguments[2] // 40))
        values = [schedule.get_sparsity_at_step(targets, jnp.int32(step)) for step in steps]
        yield f"schedule {arguments} a", np.array([value["a"] for value in values], np.float32)
        yield f"schedule {arguments} c", np.array([value["c"] for value in values], np.float32)
        due = [bool(schedule.is_mask_update_iter(jnp.int32(step))) for step in range(arguments[2] + 20)]
        yield f"schedule {arguments} due", np.array(due)


def distributions(lib: Any) -> Iterator[tuple[str, Any]]:
    *_, module = parts(lib)
    shapes = {
        "mlp": {"a": (784, 300), "b": (300, 100), "c": (100, 10), "bias": (300,)},
        "convolutions": {"a": (3, 3, 3, 64), "b": (3, 3, 64, 128), "c": (1, 1, 128, 256), "d": (256, 10)},
        "small": {"a": (4, 4), "b": (64, 64)},
    }
    for name, tree in shapes.items():
        params = {key: {"kernel": jnp.zeros(shape)} for key, shape in tree.items()}
        for sparsity in (0.0, 0.3, 0.5, 0.8, 0.95):
            for kind in ("uniform", "erk"):
                found = getattr(module, kind)(params, sparsity)
                values = [np.nan if leaf["kernel"] is None else leaf["kernel"] for _, leaf in sorted(found.items())]
                yield f"{kind} {name} {sparsity}", np.array(values, np.float64)
        custom = module.erk(params, 0.5, custom_sparsity_map={("a", "kernel"): 0.25})
        yield f"erk custom {name}", np.array([leaf["kernel"] or 0 for _, leaf in sorted(custom.items())])


def parameters() -> tuple[dict[str, Any], list[Any]]:
    """A small network's parameters, and gradients for every step: numbers, not derivatives, so that nothing depends on
    how products are rounded."""
    rng = np.random.default_rng(2)

    def tree() -> dict[str, Any]:
        shapes = {"in": (16, 24), "out": (24, 8)}
        return {name: {"kernel": jnp.asarray(rng.normal(size=shape), jnp.float32)} for name, shape in shapes.items()}

    return tree(), [tree() for _ in range(STEPS)]


def extensions(lib: Any) -> Iterator[tuple[str, Any]]:
    if lib.__name__ == "jaxpruner":
        from jaxpruner.projects.extensions import acdc, adam_fisher

        acdc.add_to_jaxpruner()
        adam_fisher.add_to_jaxpruner()
    yield from training(lib, EXTENSIONS, "adam")


def training(
    lib: Any, configs: Mapping[str, dict[str, Any]] = CONFIGS, always: str = "momentum"
) -> Iterator[tuple[str, Any]]:
    # A small eps would make the first steps of all grown weights the same size, and their order a matter of rounding.
    optimizers = {"adam": lambda: optax.adam(0.05, eps=0.3), "momentum": lambda: optax.sgd(0.05, momentum=0.9)}
    for name, config in configs.items():
        for kind, make in optimizers.items():
            if kind != always and name not in ("magnitude", "magnitude skip", "set", "rigl"):
                continue
            updater = lib.create_updater_from_config(as_config(lib, {"algorithm": name.split()[0], **config}))
            optimizer = updater.wrap_optax(make())
            params, gradients = parameters()
            state = optimizer.init(params)
            update = jax.jit(optimizer.update)
            for step, grads in enumerate(gradients):
                forward = updater.pre_forward_update(params, state)
                yield f"train {name} {kind} forward {step}", (forward["in"]["kernel"] != 0).astype(np.uint8)
                updates, state = update(grads, state, params)
                params = updater.post_gradient_update(optax.apply_updates(params, updates), state)
                for layer in params:
                    if name != "no_prune" and "ste" not in name:
                        yield f"train {name} {kind} {layer} {step}", np.asarray(state.masks[layer]["kernel"])
            yield f"train {name} {kind} parameters", params["in"]["kernel"]
            yield f"train {name} {kind} count", state.count


def as_config(lib: Any, config: Mapping[str, Any]) -> Any:
    if lib.__name__ != "jaxpruner":
        return config
    import ml_collections

    if config["algorithm"] != "no_prune":
        config = {"filter_fn": lambda key, param: param.ndim > 1, **config}
    return ml_collections.ConfigDict(config)


def instant(lib: Any) -> Iterator[tuple[str, Any]]:
    params, gradients = parameters()
    for name in ("magnitude", "saliency", "random", "global_magnitude", "global_saliency", "magnitude 2:4", "no_prune"):
        config = as_config(lib, {"algorithm": name.split()[0], **CONFIGS[name]})
        pruned, made = lib.create_updater_from_config(config).instant_sparsify(params, grads=gradients[0])
        yield f"instant {name}", pruned["out"]["kernel"]
        if name != "no_prune":
            yield f"instant {name} mask", made["in"]["kernel"]
            for key, value in lib.summarize_sparsity(pruned).items():
                yield f"summary {name} {key}", value
            other = {"in": {"kernel": jnp.ones((16, 24), np.uint8)}, "out": {"kernel": jnp.eye(24, 8, dtype=np.uint8)}}
            for key, value in lib.summarize_intersection(made, other).items():
                yield f"intersection {name} {key}", value


def run(lib: Any, *more: Callable[[Any], Iterator[tuple[str, Any]]]) -> dict[str, np.ndarray]:
    """Everything and `more`, by name. Random numbers are those of jax's newer generator on every version."""
    results: dict[str, np.ndarray] = {}
    with jax.threefry_partitionable(True):
        for scenario in (masks, schedules, distributions, training, instant, *more):
            for name, value in scenario(lib):
                assert name not in results, name
                results[name] = np.asarray(value)
    return results


def pack(results: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Few arrays instead of thousands: all of a type one after another, with names and shapes."""
    packed: dict[str, np.ndarray] = {}
    for kind in sorted({str(value.dtype) for value in results.values()}):
        chosen = {name: value for name, value in results.items() if str(value.dtype) == kind}
        flat = np.concatenate([value.reshape(-1) for value in chosen.values()])
        packed[f"{kind} values"] = flat
        packed[f"{kind} names"] = np.array([f"{name}|{','.join(map(str, v.shape))}" for name, v in chosen.items()])
    return packed


def unpack(packed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What `pack` packed."""
    results = {}
    for key in packed:
        if key.endswith(" names"):
            flat, begin = packed[key.replace(" names", " values")], 0
            for text in packed[key]:
                name, _, sides = str(text).rpartition("|")
                shape = tuple(int(side) for side in sides.split(",") if side)
                size = int(np.prod(shape, dtype=int))
                results[name] = flat[begin : begin + size].reshape(shape)
                begin += size
    return results


if __name__ == "__main__":
    import jaxpruner

    np.savez_compressed(sys.argv[1], **pack(run(jaxpruner, extensions)))  # type: ignore[arg-type]
