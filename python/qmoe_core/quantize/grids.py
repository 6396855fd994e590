"""The grids that `feedback` rounds to: how they are chosen, rounded to, and fitted to the codes they got."""

from __future__ import annotations

import itertools
import math

import torch

from ..errors import QmoeError
from ..formats import IntFormat, TernaryFormat
from . import inner_loops
from .products import has_tensor_cores, product

_TORCH = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
# The smallest scale: below it a float16 is subnormal and loses digits.
_TINY = {"float16": 2.0**-14, "bfloat16": 2.0**-100, "float32": 2.0**-100}


class IntGrid:
    """Uniform grids of one stack: weight = scale * (code - zero) per group of columns.

    Attributes:
        scale, zero: (E, N, G) float32, scale representable in the format's scale type; zero a whole number, or a half
            one for a half-step format.
        group_of: (K,) int64: the group of each column.
        top: the largest code.
    """

    def __init__(self, format: IntFormat, shape: tuple[int, int, int], device: torch.device, steps: int) -> None:
        """`shape`: (E, N, K). `steps`: how many widths of the grid are tried."""
        experts, rows, columns = shape
        self.format = format
        self.width = format.group or columns
        self.top = 2**format.bits - 1
        self.steps = steps
        groups = -(-columns // self.width)
        self.scale = torch.ones((experts, rows, groups), device=device)
        self.zero = torch.zeros((experts, rows, groups), device=device)
        self.group_of = torch.arange(columns, device=device) // self.width
        # One group a block where that is possible: its grid is then chosen with all feedback from the columns before.
        self.block = self.width if 32 <= self.width <= 128 else 32 if self.width < 32 else 128

    @property
    def per_row(self) -> bool:
        return self.scale.shape[2] == 1

    def begin(self, weight: torch.Tensor, precision: torch.Tensor) -> None:
        """Chooses the grids of whole rows, which no single block sees: weight (E, N, K), precision (E, K)."""
        if self.per_row:
            self._choose_group(weight, precision, 0)

    def begin_block(self, target: torch.Tensor, precision: torch.Tensor, columns: slice) -> None:
        if self.per_row:
            return
        for first in range(columns.start, columns.stop, self.width):
            part = slice(first - columns.start, min(first + self.width, columns.stop) - columns.start)
            self._choose_group(target[:, :, part], precision[:, part], first // self.width)

    def _choose_group(self, target: torch.Tensor, precision: torch.Tensor, group: int) -> None:
        loops = inner_loops.of(target)
        if loops is not None and target.shape[2] <= loops.MAX_GROUP:
            loops.choose_grid(self, target, precision, group)
        else:
            self._choose(target, precision, slice(group, group + 1))

    def _choose(self, target: torch.Tensor, precision: torch.Tensor, group: slice) -> None:
        """The scale and zero of one group with the least weighted error: `target` (E, N, B), `precision` (E, B).

        Tried are widths of the grid from the group's whole range down to a third of it, each with the zero that centres
        it; below 4 bits with its neighbours too, since there a step more or less below zero matters. Infinite where no
        scale fits into its type.
        """
        low, high = target.amin(2).clamp(max=0), target.amax(2).clamp(min=0)
        weight = precision.unsqueeze(1)
        half = 0.5 if self.format.half_step else 0.0
        best = torch.full_like(low, math.inf)
        scale, zero = torch.full_like(low, math.inf), torch.zeros_like(low)
        if not self.format.zero_point:
            low = -torch.maximum(high, -low)
            high = -low if half else low.abs() * (self.top - 1) / (self.top + 1)
        neighbours = (-1, 0, 1) if self.format.bits < 4 and self.format.zero_point else (0,)
        # Without a zero point the grid reaches one step further down than up: a negative scale turns it round.
        signs = (1.0,) if self.format.zero_point or half else (1.0, -1.0)
        for step in range(self.steps):
            share = 1 - step * (2 / 3) / max(self.steps - 1, 1)
            size = self.stored((high - low) * share / self.top)
            if self.format.zero_point:
                centre = (-low * share / size - half).round()
            else:
                centre = torch.full_like(size, float((self.top + 1) // 2))
                if half:
                    centre -= 1
            for offset, sign in itertools.product(neighbours, signs):
                shift = (centre + offset).clamp(0, self.top) + half
                tried = size * sign
                codes = (target / tried.unsqueeze(2) + shift.unsqueeze(2)).round_().clamp_(0, self.top)
                error = (codes.sub_(shift.unsqueeze(2)).mul_(tried.unsqueeze(2)).sub_(target).square_() * weight).sum(2)
                better = error < best
                best = torch.where(better, error, best)
                scale, zero = torch.where(better, tried, scale), torch.where(better, shift, zero)
        self.scale[:, :, group.start], self.zero[:, :, group.start] = scale, zero

    def stored(self, scale: torch.Tensor) -> torch.Tensor:
        """Positive scales as the format will store them, infinite where they overflow its type: `check` raises that, so
        that a GPU need not be waited for in every block."""
        kind = self.format.scale_dtype
        return scale.clamp(min=_TINY[kind]).to(_TORCH[kind]).float()

    def round(self, target: torch.Tensor, precision: torch.Tensor, column: int) -> tuple[torch.Tensor, torch.Tensor]:
        group = column // self.width
        scale, zero = self.scale[:, :, group], self.zero[:, :, group]
        codes = (target / scale + zero).round_().clamp_(0, self.top)
        return codes.to(torch.uint8).view(torch.int8), scale * (codes - zero)

    def refine_block(
        self, residual: torch.Tensor, gradient: torch.Tensor, hessian: torch.Tensor, codes: torch.Tensor, columns: slice
    ) -> None:
        """Each group's scale by least squares under H, one group after the other."""
        if self.per_row:
            return
        for first in range(columns.start, columns.stop, self.width):
            part = slice(first - columns.start, min(first + self.width, columns.stop) - columns.start)
            group = first // self.width
            steps = codes[:, :, part].view(torch.uint8) - self.zero[:, :, group].unsqueeze(2)
            through = torch.bmm(steps, hessian[:, part, :])
            change = self._scale_step(
                (gradient[:, :, part] * steps).sum(2), (through[:, :, part] * steps).sum(2), group
            ).unsqueeze(2)
            residual[:, :, part].addcmul_(steps, change, value=-1)
            gradient.addcmul_(through, change, value=-1)

    def refine(self, residual: torch.Tensor, hessian: torch.Tensor, codes: torch.Tensor) -> None:
        """The scales of whole rows by least squares under H; `residual` (E, N, K) follows. Raises `E_VALUE` where any
        scale, also of groups, overflows its type."""
        if self.per_row:
            steps = codes.view(torch.uint8) - self.zero
            # Differences of codes are bfloat16 numbers, but for halves above 128.
            through = product(steps, hessian, 2 if self.format.half_step and self.format.bits == 8 else 1, 2)
            change = self._scale_step((through * residual).sum(2), (through * steps).sum(2), 0)
            residual.addcmul_(steps, change.unsqueeze(2), value=-1)
        self.check()

    def check(self) -> None:
        """Raises `E_VALUE` where a scale overflows its type. Waits for the device."""
        if bool(torch.isinf(self.scale).any()):
            kind = self.format.scale_dtype
            raise QmoeError("E_VALUE", f"a scale overflows {kind}; use scale_dtype bfloat16 or float32")

    def _scale_step(self, slope: torch.Tensor, curvature: torch.Tensor, group: int) -> torch.Tensor:
        """Moves a group's scale to the minimum of its parabola, where there is one; returns the change (E, N)."""
        old = self.scale[:, :, group].clone()
        best = old + torch.where(curvature > 0, slope / curvature, torch.zeros_like(slope))
        new = torch.where(best * old > 0, self.stored(best.abs()) * old.sign(), old)
        self.scale[:, :, group] = new
        return new - old


class TernaryGrid:
    """{low, 0, high} per row, chosen by error and rate: a code is the one with the least
    precision * (target - value)^2 + price * bits(code), bits being what the codes of the matrix's own distribution
    cost: -log2 of their frequency.

    Attributes:
        low, high: (E, N) float32, bfloat16 values, low <= 0 <= high; low = -high for symmetric formats.
        price: (E, N) float32: error that one bit is worth.
        bits: (E, 3) float32 of the codes -1, 0, 1.
    """

    block = 128

    def __init__(self, format: TernaryFormat, price: torch.Tensor) -> None:
        self.format = format
        self.price = price
        self.low = self.high = torch.zeros_like(price)
        self.bits = price.new_tensor([2.0, 1.0, 2.0]).repeat(len(price), 1)

    def begin(self, weight: torch.Tensor, precision: torch.Tensor, rounds: int = 12) -> None:
        """Levels and bits for weights (E, N, K) and precisions (E, K), without feedback: Lloyd's iteration with a price
        on bits, from levels at 1.3 times the mean magnitude (a Gaussian's best ones are at 1.5)."""
        self.high = 1.3 * weight.abs().mean(2)
        self.low = -self.high
        importance = precision.unsqueeze(1)
        loops = inner_loops.of(weight)
        for _ in range(rounds):
            if loops is not None:
                sums, counts = loops.ternary_sums(self, weight, precision)
                low_sum, low_weight, high_sum, high_weight = sums.unbind(2)
            else:
                codes, _ = self.round(weight, precision.unsqueeze(1), 0)
                plus, minus = importance * (codes > 0), importance * (codes < 0)
                high_sum, high_weight = (plus * weight).sum(2), plus.sum(2)
                low_sum, low_weight = (minus * weight).sum(2), minus.sum(2)
            self._set_levels(
                high_sum / high_weight.clamp(min=1e-30),
                low_sum / low_weight.clamp(min=1e-30),
                high_weight,
                low_weight,
            )
            if loops is not None:
                self._set_bits(counts.float() / weight[0].numel())
            else:
                self.count(codes)

    def begin_block(self, target: torch.Tensor, precision: torch.Tensor, columns: slice) -> None:
        pass

    def refine_block(
        self, residual: torch.Tensor, gradient: torch.Tensor, hessian: torch.Tensor, codes: torch.Tensor, columns: slice
    ) -> None:
        pass

    def round(self, target: torch.Tensor, precision: torch.Tensor, column: int) -> tuple[torch.Tensor, torch.Tensor]:
        """As `Grid.round`; also takes (E, N, K) targets with (E, 1, K) precisions."""
        shape = (slice(None), slice(None), *(None for _ in range(target.ndim - 2)))
        low, high = self.low[shape], self.high[shape]
        if target.ndim == 2:
            precision = precision.unsqueeze(1)
        cost_low, cost_zero, cost_high = ((self.price * self.bits[:, i, None])[shape] for i in range(3))
        at_zero = precision * target.square() + cost_zero
        at_high = precision * (target - high).square() + cost_high
        at_low = precision * (target - low).square() + cost_low
        up = at_high < at_zero
        down = at_low < torch.minimum(at_high, at_zero)
        codes = up.to(torch.int8).masked_fill_(down, -1)
        zero = torch.zeros((), device=target.device)
        return codes, torch.where(down, low, torch.where(up, high, zero))

    def refine(self, residual: torch.Tensor, hessian: torch.Tensor, codes: torch.Tensor) -> None:
        """Both levels of every row by least squares under H (2 x 2 normal equations); `residual` (E, N, K) follows.
        A level that no weight of its row has stays."""
        signs = torch.bfloat16 if has_tensor_cores(hessian) else hessian.dtype
        up, down = codes > 0, codes < 0
        plus, minus = up.to(signs), down.to(signs)
        # Sums of zeros and ones, of a row in float32 exact.
        share = torch.stack([sign.sum(2, dtype=torch.float32).mean(1) for sign in (minus, plus)], dim=1)
        share /= codes.shape[2]
        old_high, old_low = self.high, self.low
        if self.format.levels == "symmetric":
            plus -= minus
            through = product(plus, hessian, 1, 2)
            a = c = (through * plus).sum(2)
            high = (through * residual).sum(2) / a.clamp(min=1e-30) + old_high
            low = -high
        else:
            ups, downs = product(torch.cat([plus, minus], dim=1), hessian, 1, 2).split(codes.shape[1], dim=1)
            a, b, x = (ups * plus).sum(2), (ups * minus).sum(2), (ups * residual).sum(2)
            c, y = (downs * minus).sum(2), (downs * residual).sum(2)
            determinant = a * c - b * b
            sound = determinant > 1e-6 * a * c
            safe = torch.where(sound, determinant, torch.ones_like(determinant))
            # The best change of both; where they would do the same to the outputs, of one of them.
            alone = torch.where(a > 0, torch.zeros_like(y), y / c.clamp(min=1e-30))
            high = old_high + torch.where(sound, (x * c - y * b) / safe, x / a.clamp(min=1e-30))
            low = old_low + torch.where(sound, (y * a - x * b) / safe, alone)
        self._set_levels(high, low, a, c)
        residual += up * (old_high - self.high).unsqueeze(2)
        residual += down * (old_low - self.low).unsqueeze(2)
        self._set_bits(torch.stack([share[:, 0], 1 - share.sum(1), share[:, 1]], dim=1))

    def _set_levels(
        self, high: torch.Tensor, low: torch.Tensor, weight_high: torch.Tensor, weight_low: torch.Tensor
    ) -> None:
        if self.format.levels == "symmetric":
            total = (weight_high + weight_low).clamp(min=1e-30)
            high = (high * weight_high - low * weight_low) / total
            low, weight_high, weight_low = -high, total, total
        high = torch.where(weight_high > 0, high.clamp(min=0), self.high).bfloat16().float()
        low = torch.where(weight_low > 0, low.clamp(max=0), self.low).bfloat16().float()
        self.high, self.low = high, low

    def count(self, codes: torch.Tensor) -> None:
        """Sets `bits` by the frequencies of the codes (E, N, K)."""
        self._set_bits(torch.stack([(codes == value).float().mean((1, 2)) for value in (-1, 0, 1)], dim=1))

    def _set_bits(self, share: torch.Tensor) -> None:
        """By shares (E, 3) of the codes -1, 0, 1; none is taken to be rarer than 1 in 10,000."""
        share = share.clamp(min=1e-4)
        self.bits = -torch.log2(share / share.sum(1, keepdim=True))
