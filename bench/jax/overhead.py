"""What wrapping an optimizer costs a training step, on a transformer of 25 million parameters.

    python bench/jax/overhead.py --json bench/results/jax-overhead.json

Steps are whole: forward, backward, AdamW, masks. Each variant alternates with plain AdamW, as the speed of a machine
that others use changes; medians of the ratios. A step that changes masks is timed by itself and counted by its share,
one in 100. JaxPruner (github.com/google-research/jaxpruner) takes part where it is installed.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import qmoe_core.jax as qjax

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import write_results

LAYERS, WIDTH, HEADS, VOCABULARY = 8, 512, 8, 2048
EVERY = 100  # steps between changes of masks
CONFIG = {"dist_type": "uniform", "sparsity": 0.8, "update_freq": EVERY, "update_start_step": 0}
CONFIG |= {"update_end_step": 100_000}
VARIANTS: dict[str, dict[str, Any]] = {
    "magnitude": {},
    "magnitude, packed masks": {"use_packed_masks": True},
    "rigl": {},
    "magnitude_ste": {},
}


def parameters() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    shapes = {
        "attention": (WIDTH, 3 * WIDTH),
        "mix": (WIDTH, WIDTH),
        "up": (WIDTH, 4 * WIDTH),
        "down": (4 * WIDTH, WIDTH),
    }

    def layer() -> dict[str, Any]:
        made = {name: {"kernel": rng.normal(0, shape[0] ** -0.5, shape)} for name, shape in shapes.items()}
        return made | {"norm": {"scale": np.ones(WIDTH)}, "norm2": {"scale": np.ones(WIDTH)}}

    tree: dict[str, Any] = {f"layer_{i}": layer() for i in range(LAYERS)}
    tree["embedding"] = {"table": rng.normal(0, 0.02, (VOCABULARY, WIDTH))}
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), tree)


def loss(params: dict[str, Any], tokens: jax.Array) -> jax.Array:
    """Next-token cross-entropy of a pre-norm decoder, mean over tokens."""

    def norm(x: jax.Array, scale: jax.Array) -> jax.Array:
        return scale * x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)

    x = params["embedding"]["table"][tokens]
    batch, length, _ = x.shape
    causal = jnp.tril(jnp.ones((length, length), bool))
    for i in range(LAYERS):
        layer = params[f"layer_{i}"]
        heads = (norm(x, layer["norm"]["scale"]) @ layer["attention"]["kernel"]).reshape(batch, length, 3, HEADS, -1)
        q, k, v = (heads[:, :, j].swapaxes(1, 2) for j in range(3))
        weights = jnp.where(causal, q @ k.swapaxes(2, 3) * (HEADS / WIDTH) ** 0.5, -1e9)
        mixed = (jax.nn.softmax(weights) @ v).swapaxes(1, 2).reshape(batch, length, WIDTH)
        x = x + mixed @ layer["mix"]["kernel"]
        x = x + jax.nn.gelu(norm(x, layer["norm2"]["scale"]) @ layer["up"]["kernel"]) @ layer["down"]["kernel"]
    logits = x @ params["embedding"]["table"].T
    return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:]).mean()


class Trainer:
    """A model, its optimizer and the compiled step. `lib` None: the optimizer alone."""

    def __init__(self, tokens: jax.Array, lib: Any = None, config: dict[str, Any] | None = None) -> None:
        optimizer = optax.adamw(1e-3)
        updater = None
        if lib is not None and config is not None:
            updater = lib.create_updater_from_config(as_config(lib, config))
            optimizer = updater.wrap_optax(optimizer)

        def step(params: Any, state: Any) -> Any:
            used = params if updater is None else updater.pre_forward_update(params, state)
            updates, state = optimizer.update(jax.grad(loss)(used, tokens), state, params)
            params = optax.apply_updates(params, updates)
            return params if updater is None else updater.post_gradient_update(params, state), state

        self.params, self.wrapped = parameters(), updater is not None
        self.state = jax.jit(optimizer.init)(self.params)
        self.step = jax.jit(step, donate_argnums=(0, 1))

    def time(self, count: int) -> float:
        """Seconds of one step, with masks as in step `count`."""
        if self.wrapped:
            self.state = self.state._replace(count=jnp.int32(count))
        jax.block_until_ready((self.params, self.state))
        begun = time.perf_counter()
        self.params, self.state = jax.block_until_ready(self.step(self.params, self.state))
        return time.perf_counter() - begun


def as_config(lib: Any, config: dict[str, Any]) -> Any:
    if lib is qjax:
        return config
    import ml_collections

    return ml_collections.ConfigDict(config)


def contenders(tokens: jax.Array) -> dict[str, Callable[[], Trainer]]:
    made: dict[str, Callable[[], Trainer]] = {"adamw": lambda: Trainer(tokens)}
    for name, settings in VARIANTS.items():
        config = CONFIG | {"algorithm": name.replace(",", "").split()[0]} | settings
        made[name] = lambda config=config: Trainer(tokens, qjax, config)  # type: ignore[misc]
    try:
        import jaxpruner
    except ImportError:
        return made
    if not hasattr(jax, "tree_map"):  # removed from jax; JaxPruner calls it
        jax.tree_map = jax.tree.map
    made["JaxPruner magnitude"] = lambda: Trainer(tokens, jaxpruner, CONFIG | {"algorithm": "magnitude"})
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--changes", type=int, default=2, help="steps timed that change masks")
    arguments = parser.parse_args()
    shape = arguments.batch, arguments.length
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, VOCABULARY, shape), jnp.int32)
    rows = []
    for name, make in contenders(tokens).items():
        # Each beside its own runs of plain AdamW: machines that others use change their speed from minute to minute.
        plain, trainer = Trainer(tokens), make()
        for one in (plain, trainer):
            one.time(1), one.time(EVERY)
        pairs = [(plain.time(1), trainer.time(1)) for _ in range(arguments.rounds)]
        ratio = statistics.quantiles([wrapped / alone for alone, wrapped in pairs], n=4, method="inclusive")
        alone, wrapped = (statistics.median(column) for column in zip(*pairs, strict=True))
        change = statistics.median(trainer.time(EVERY) for _ in range(arguments.changes))
        rows.append(
            {
                "name": name,
                "plain_ms": 1e3 * alone,
                "step_ms": 1e3 * wrapped,
                "ratio": ratio[1],
                "ratio_quartiles": [ratio[0], ratio[2]],
                "change_ms": 1e3 * change,
                "overhead": ratio[1] - 1 + max(0.0, change - wrapped) / EVERY / alone,
            }
        )
    size = sum(leaf.size for leaf in jax.tree.leaves(parameters()))
    write_results(
        arguments.json, "jax-overhead", rows, parameters=size, tokens=tokens.size, every=EVERY, rounds=arguments.rounds,
        jax=jax.__version__, optax=optax.__version__,
    )  # fmt: skip


if __name__ == "__main__":
    main()
