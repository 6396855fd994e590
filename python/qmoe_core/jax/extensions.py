"""More algorithms: AC/DC, Fisher scores from Adam, gradual n:m, and Wanda."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ..errors import QmoeError
from .masks import MASK_DTYPE, kept_count, mask_of_count, n_by_m, per_output
from .pruners import MagnitudePruning
from .schedules import NoUpdateSchedule
from .state import SparseState, find_states, map_param_like
from .trees import Key, Tree, keyed_leaves, map_leaves
from .types import NByM, Unstructured
from .updater import BaseUpdater


@dataclass(frozen=True)
class ACDCSchedule(NoUpdateSchedule):
    """When AC/DC changes between dense and sparse; see `ACDC`.

    Example:
        >>> from qmoe_core.jax import ACDCSchedule
        >>> schedule = ACDCSchedule(
        ...     init_dense_steps_end=2, final_sparse_steps_start=20, cycle_sparse_steps=5, cycle_dense_steps=4
        ... )
        >>> [step for step in range(25) if schedule.is_mask_update_iter(step)]
        [2, 7, 11, 16, 20]
    """

    init_dense_steps_end: int
    final_sparse_steps_start: int
    cycle_sparse_steps: int
    cycle_dense_steps: int

    def __post_init__(self) -> None:
        """Raises `E_VALUE`."""
        if min(self.cycle_sparse_steps, self.cycle_dense_steps) < 1:
            raise QmoeError("E_VALUE", "phases of AC/DC have at least one step")
        if not 0 <= self.init_dense_steps_end <= self.final_sparse_steps_start:
            raise QmoeError("E_VALUE", "AC/DC is sparse for good only after its first dense steps",
                            expected=f"0 <= init_dense_steps_end <= {self.final_sparse_steps_start}",
                            actual=self.init_dense_steps_end)  # fmt: skip

    def becomes_sparse(self, step: Any) -> Any:
        """Whether a sparse phase begins at this step."""
        place = (step - self.init_dense_steps_end) % (self.cycle_sparse_steps + self.cycle_dense_steps)
        return self._cycling(step) & ((place == 0) | (step == self.final_sparse_steps_start))

    def becomes_dense(self, step: Any) -> Any:
        """Whether a dense phase begins at this step."""
        place = (step - self.init_dense_steps_end) % (self.cycle_sparse_steps + self.cycle_dense_steps)
        return self._cycling(step) & (place == self.cycle_sparse_steps) & (step != self.final_sparse_steps_start)

    def is_mask_update_iter(self, step: Any) -> Any:
        return self.becomes_sparse(step) | self.becomes_dense(step)

    def _cycling(self, step: Any) -> Any:
        return (step >= self.init_dense_steps_end) & (step <= self.final_sparse_steps_start)


@dataclass
class ACDC(MagnitudePruning):
    """Alternates between sparse phases, by magnitude, and dense ones (arXiv 2106.12379).

    Dense until `init_dense_steps_end`, then `cycle_sparse_steps` sparse and `cycle_dense_steps` dense in turn, sparse
    for good from `final_sparse_steps_start`. `reset_optimizer` zeroes its moments at every change. It has a schedule of
    its own.

    Example:
        >>> from functools import partial
        >>> import jax.numpy as jnp, optax
        >>> from qmoe_core.jax import ACDC, ACDCSchedule, uniform
        >>> params = {"kernel": jnp.array([[4.0, 1.0], [2.0, 3.0]])}
        >>> pruner = ACDC(ACDCSchedule(2, 20, 5, 5), sparsity_distribution_fn=partial(uniform, sparsity=0.5))
        >>> state = pruner.wrap_optax(optax.adam(0.1)).init(params)
        >>> state.masks["kernel"].tolist()
        [[1, 1], [1, 1]]
    """

    init_dense_steps_end: int = 0
    final_sparse_steps_start: int = 0
    cycle_sparse_steps: int = 1
    cycle_dense_steps: int = 1
    reset_optimizer: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.scheduler = ACDCSchedule(
            self.init_dense_steps_end, self.final_sparse_steps_start, self.cycle_sparse_steps, self.cycle_dense_steps
        )

    def update_state(self, sparse_state: SparseState, params: Tree, grads: Tree, **kwargs: Any) -> SparseState:
        def sparse() -> Tree:
            scores = self.calculate_scores(params, sparse_state=sparse_state, grads=grads, **kwargs)
            return self._stored(self.create_masks(scores, sparse_state.target_sparsities))

        def dense() -> Tree:
            return self._stored(self.get_initial_masks(params, sparse_state.target_sparsities))

        step = sparse_state.count
        due = self.scheduler.is_mask_update_iter(step)
        masks = jax.lax.cond(
            due,
            lambda: jax.lax.cond(self.scheduler.becomes_sparse(step), sparse, dense),
            lambda: sparse_state.masks,
        )
        if not self.reset_optimizer:
            return sparse_state._replace(masks=masks)
        inner = map_param_like(
            lambda _, leaf: jnp.where(due, jnp.zeros_like(leaf), leaf), sparse_state.inner_state, params, any_shape=True
        )
        return sparse_state._replace(masks=masks, inner_state=inner)


@dataclass
class AdamBasedFisherPruning(BaseUpdater):
    """The weights go whose loss would change least to second order, with Adam's second moment for the diagonal of the
    Fisher matrix: weight^2 x moment (after arXiv 2004.14340).

    The optimizer has one Adam state, anywhere in it. `reset_adam` zeroes its moments when masks change.

    Example:
        >>> from functools import partial
        >>> import jax.numpy as jnp, optax
        >>> from qmoe_core.jax import AdamBasedFisherPruning, OneShotSchedule, uniform
        >>> params = {"kernel": jnp.array([[4.0, 1.0], [2.0, 3.0]])}
        >>> pruner = AdamBasedFisherPruning(OneShotSchedule(5), sparsity_distribution_fn=partial(uniform, sparsity=0.5))
        >>> state = pruner.wrap_optax(optax.adam(0.1)).init(params)
        >>> state.masks["kernel"].tolist()
        [[1, 1], [1, 1]]
    """

    reset_adam: bool = False

    def calculate_scores(
        self, params: Tree, sparse_state: SparseState | None = None, grads: Tree = None, **kwargs: Any
    ) -> Tree:
        inner = None if sparse_state is None else sparse_state.inner_state
        found = find_states(inner, optax.ScaleByAdamState)
        if len(found) != 1:
            raise QmoeError("E_MISSING", "Fisher scores need one Adam state (sparse_state)", expected=1,
                            actual=len(found))  # fmt: skip
        return jax.tree.map(lambda param, nu: jnp.square(param) * nu, params, found[0].nu)

    def update_state(self, sparse_state: SparseState, params: Tree, grads: Tree, **kwargs: Any) -> SparseState:
        new = super().update_state(sparse_state, params, grads, **kwargs)
        if not self.reset_adam:
            return new
        inner = jax.tree.map(
            lambda node: jax.tree.map(jnp.zeros_like, node)._replace(count=node.count) if _is_adam(node) else node,
            new.inner_state,
            is_leaf=_is_adam,
        )
        return new._replace(inner_state=inner)


def _is_adam(node: Any) -> bool:
    return isinstance(node, optax.ScaleByAdamState)


@dataclass
class IterativeNMPruning(MagnitudePruning):
    """Gradually to n:m: as many weights as the schedule says are kept, first those that n:m would keep, then the
    largest of the others. The target sparsity is 1 - n/m (arXiv 2309.08520).

    Example:
        >>> from functools import partial
        >>> import jax.numpy as jnp, optax
        >>> from qmoe_core.jax import IterativeNMPruning, NByM, OneShotSchedule, uniform
        >>> params = {"kernel": jnp.array([[4.0, 1.0, 2.0, 3.0]])}
        >>> half = partial(uniform, sparsity=0.5)
        >>> pruner = IterativeNMPruning(OneShotSchedule(0), sparsity_type=NByM(2, 4), sparsity_distribution_fn=half)
        >>> pruner.instant_sparsify(params)[1]["kernel"].tolist()
        [[1, 0, 0, 1]]
    """

    def __post_init__(self) -> None:
        kind = self.sparsity_type
        if not isinstance(kind, NByM):
            raise QmoeError("E_VALUE", "iterative_nm needs an n:m sparsity type", actual=kind)

        def topk(scores: Any, sparsity: Any) -> jax.Array:
            scores = jnp.asarray(scores)
            chosen = n_by_m(scores, kind.n, kind.m, kind.axis) == 1
            count, winners = kept_count(scores.size, sparsity), jnp.sum(chosen, dtype=jnp.int32)
            first = mask_of_count(jnp.where(chosen, scores, -jnp.inf), jnp.minimum(count, winners))
            others = mask_of_count(jnp.where(chosen, -jnp.inf, scores), jnp.maximum(count - winners, 0))
            return jnp.maximum(first, others).astype(MASK_DTYPE)

        if self.topk_fn is None:
            self.topk_fn = topk
        super().__post_init__()


@dataclass
class WandaPruning(BaseUpdater):
    """|weight| times the L2 norm of its input over calibration tokens, compared per output (arXiv 2306.11695).

    `instant_sparsify(params, input_norms=...)`, or `update(..., input_norms=...)`, takes a tree like the parameters:
    None for what stays dense, else norms (inputs,) for kernels (..., inputs, outputs), or any array that broadcasts to
    the kernel. With n:m or blocks the pattern itself is what is compared within.

    Attributes:
        output_axes: axes of outputs, each index of which keeps the same share: the last; (0, -1) for stacks of experts
            (E, inputs, outputs).

    Example:
        >>> from functools import partial
        >>> import jax.numpy as jnp
        >>> from qmoe_core.jax import WandaPruning, uniform
        >>> wanda = WandaPruning(sparsity_distribution_fn=partial(uniform, sparsity=0.5))
        >>> kernel, norms = jnp.array([[1.0, 4.0], [3.0, 2.0]]), jnp.array([5.0, 1.0])
        >>> print(wanda.instant_sparsify({"kernel": kernel}, input_norms={"kernel": norms})[0]["kernel"])
        [[1. 4.]
         [0. 0.]]
    """

    output_axes: tuple[int, ...] = (-1,)

    def __post_init__(self) -> None:
        if self.topk_fn is None and isinstance(self.sparsity_type, Unstructured):
            self.topk_fn = lambda scores, sparsity: per_output(scores, sparsity, self.output_axes)
        super().__post_init__()

    def calculate_scores(
        self,
        params: Tree,
        sparse_state: SparseState | None = None,
        grads: Tree = None,
        *,
        input_norms: Tree = None,
        **kwargs: Any,
    ) -> Tree:
        if input_norms is None:
            raise QmoeError("E_MISSING", "Wanda needs input_norms")

        def score(param: jax.Array, norm: Any) -> jax.Array:
            if norm is None:
                return jnp.abs(param)
            norm = jnp.asarray(norm)
            if norm.ndim == 1 and param.ndim > 1:
                norm = norm[:, None]
            try:
                return jnp.abs(param) * jnp.broadcast_to(norm, param.shape)
            except ValueError as error:
                raise QmoeError("E_SHAPE", "input norms of another kernel", expected=param.shape,
                                actual=norm.shape) from error  # fmt: skip

        return map_leaves(score, params, input_norms)


def dense_input_norms(module: Any, variables: Mapping[str, Any], batches: Iterable[Any]) -> Tree:
    """L2 norms of what goes into every `flax.linen.Dense` of a module: `input_norms` of Wanda.

    Args:
        module: a flax.linen module; `batches` of arguments for `module.apply(variables, ...)`, a tuple or one array
            each.

    Returns:
        A tree like `variables["params"]`: float32 (inputs,) for kernels of dense layers, None for the rest.
    """
    import flax.linen as nn

    sums: dict[Key, Any] = {}

    def record(next_fun: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        if isinstance(context.module, nn.Dense) and context.method_name == "__call__":
            key = (*context.module.path, "kernel")
            inputs = jnp.asarray(args[0] if args else kwargs["inputs"], jnp.float32)
            sums[key] = sums.get(key, 0.0) + jnp.sum(jnp.square(inputs), axis=tuple(range(inputs.ndim - 1)))
        return next_fun(*args, **kwargs)

    with nn.intercept_methods(record):
        for batch in batches:
            module.apply(variables, *(batch if isinstance(batch, tuple) else (batch,)))
    leaves, structure = keyed_leaves(variables["params"])
    norms = [jnp.sqrt(sums[key]) if key in sums else None for key, _ in leaves]
    return jax.tree_util.tree_unflatten(structure, norms)
