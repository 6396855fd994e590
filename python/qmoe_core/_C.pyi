"""Types of the compiled core (cpp/bind)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

def rtn_int(
    weight: NDArray[np.float32],
    bits: int,
    group: int,
    zero_point: bool = True,
    scale_dtype: str = "float16",
    half_step: bool = False,
) -> tuple[NDArray[np.uint8], NDArray[np.float32], NDArray[np.uint8] | None]: ...
def build_record(rows: int, cols: int, matrices: list[dict[str, Any]], threads: int = 0) -> NDArray[np.uint8]: ...
def inspect_record(record: NDArray[np.uint8], verify: bool = False) -> dict[str, Any]: ...
def decode_record(record: NDArray[np.uint8], expert: int, check_crc: bool = True) -> NDArray[np.float32]: ...
def slice_experts(record: NDArray[np.uint8], first: int, count: int) -> NDArray[np.uint8]: ...
def join_records(records: Sequence[NDArray[np.uint8]]) -> tuple[NDArray[np.uint8], list[int]]: ...
def linear(
    packed: int,
    nbytes: int,
    offsets: int,
    offset_count: int,
    x: int,
    x_dtype: str,
    tokens: int,
    in_features: int,
    out: int,
    out_features: int,
    threads: int,
) -> None: ...
def prepacked_linear(
    prepacked: int,
    nbytes: int,
    offsets: int,
    offset_count: int,
    x: int,
    x_dtype: str,
    tokens: int,
    in_features: int,
    out: int,
    out_features: int,
    precision: str,
    threads: int,
) -> None: ...
def prepack_size(packed: int, nbytes: int, order: str) -> int: ...
def prepack(packed: int, nbytes: int, order: str, out: int, out_bytes: int, threads: int) -> None: ...
def experts(
    first: int,
    first_bytes: int,
    second: int,
    second_bytes: int,
    first_bias: int,
    second_bias: int,
    activation: str,
    gated: bool,
    clamped: bool,
    alpha: float,
    limit: float,
    precision: str,
    x: int,
    x_dtype: str,
    tokens: int,
    in_features: int,
    ids: int,
    weights: int,
    top_k: int,
    out: int,
    threads: int,
) -> None: ...
def tuning() -> dict[str, int]: ...
def set_tuning(
    prefetch_narrow: int, prefetch_wide: int, direct_tokens: int, near_narrow: int, near_wide: int
) -> None: ...
def prepacked_shape(layout: int, nbytes: int) -> tuple[int, int, int]: ...
def crc32c(bytes: Any, seed: int = 0) -> int: ...
def cpu_features() -> list[str]: ...
def version() -> str: ...
def release_memory() -> bool: ...

class SafetensorsFile:
    tensors: dict[str, tuple[str, tuple[int, ...], int, int]]
    metadata: dict[str, str]
    def __init__(self, path: str | os.PathLike[str]) -> None: ...
    def read(self, name: str) -> NDArray[np.uint8]: ...
    def read_range(self, name: str, begin: int, count: int) -> NDArray[np.uint8]: ...
    def close(self) -> None: ...
    def __enter__(self) -> SafetensorsFile: ...
    def __exit__(self, *exc: object) -> None: ...

def cuda_info() -> dict[str, Any]: ...

class CudaRecord:
    def __init__(self, record: NDArray[np.uint8]) -> None: ...
    def table(self, expert: int) -> NDArray[np.uint32]: ...
    def dequantize(self, expert: int, record_on_device: int, table: int, out: int, dtype: str, stream: int) -> None: ...

class CudaInt:
    @property
    def bytes(self) -> int: ...
    def __init__(self, record: NDArray[np.uint8], order: str = "plain") -> None: ...
    def prepack(self, record_on_device: int, out: int, out_bytes: int, stream: int) -> None: ...
    def unpack(self, tiles: int, expert: int, out: int, dtype: str, stream: int) -> None: ...
    def linear(
        self,
        tiles: int,
        x: int,
        bias: int,
        y: int,
        tokens: int,
        dtype: str,
        stream: int,
        workspace: int = 0,
        workspace_bytes: int = 0,
        kernel: str = "auto",
    ) -> None: ...
    def linear_workspace(self, tokens: int, kernel: str = "auto") -> int: ...

class CudaTernary:
    @property
    def bytes(self) -> int: ...
    @property
    def shape(self) -> dict[str, int]: ...
    def __init__(self, record: NDArray[np.uint8], order: str = "plain", threads: int = 1) -> None: ...
    def take(self) -> NDArray[np.uint8]: ...
    def unpack(self, streams: int, expert: int, out: int, dtype: str, stream: int, count: int = 1) -> None: ...
    def linear_workspace(self, tokens: int, kernel: str = "auto") -> int: ...
    def linear(
        self,
        streams: int,
        x: int,
        bias: int,
        y: int,
        tokens: int,
        dtype: str,
        stream: int,
        workspace: int = 0,
        workspace_bytes: int = 0,
        kernel: str = "auto",
    ) -> None: ...

class CudaIntExperts:
    def __init__(
        self,
        first: CudaInt,
        second: CudaInt,
        activation: str,
        clamped: bool = False,
        alpha: float = 0.0,
        limit: float = 0.0,
        kernel: str = "auto",
    ) -> None: ...
    def workspace(self, tokens: int, top_k: int) -> int: ...
    def run(
        self,
        first_weights: int,
        second_weights: int,
        first_bias: int,
        second_bias: int,
        x: int,
        dtype: str,
        tokens: int,
        ids: int,
        weights: int,
        weights_dtype: str,
        top_k: int,
        y: int,
        workspace: int,
        workspace_bytes: int,
        stream: int,
    ) -> None: ...

class CudaTernaryExperts:
    def __init__(
        self,
        first: CudaTernary,
        second: CudaTernary,
        activation: str,
        clamped: bool = False,
        alpha: float = 0.0,
        limit: float = 0.0,
        kernel: str = "auto",
    ) -> None: ...
    def workspace(self, tokens: int, top_k: int) -> int: ...
    def run(
        self,
        first_weights: int,
        second_weights: int,
        first_bias: int,
        second_bias: int,
        x: int,
        dtype: str,
        tokens: int,
        ids: int,
        weights: int,
        weights_dtype: str,
        top_k: int,
        y: int,
        workspace: int,
        workspace_bytes: int,
        stream: int,
    ) -> None: ...

class CudaTernaryEncoder:
    @property
    def tables(self) -> NDArray[np.uint8]: ...
    @property
    def offsets(self) -> int: ...
    @property
    def scratch(self) -> int: ...
    @property
    def head(self) -> int: ...
    def __init__(self, levels: NDArray[np.float32], cols: int, counts: NDArray[np.uint64]) -> None: ...
    def code(
        self,
        trits: int,
        matrices: int,
        tables: int,
        offsets: int,
        misfits: int,
        scratch: int,
        scratch_bytes: int,
        stream: int,
    ) -> None: ...
    def places(self, offsets: NDArray[np.uint32], misfits: NDArray[np.uint32]) -> tuple[NDArray[np.uint64], int]: ...
    def words(
        self, matrices: int, offsets: int, scratch: int, scratch_bytes: int, first_words: int, out: int, stream: int
    ) -> None: ...
    def finish(self, offsets: NDArray[np.uint32], record: NDArray[np.uint8], threads: int = 0) -> None: ...

def cuda_ternary_census(trits: int, rows: int, cols: int, counts: int, stream: int) -> None: ...
def cuda_round_block(block: dict[str, int], grid: dict[str, int], stream: int) -> None: ...
def cuda_choose_grid(target: dict[str, int], grid: dict[str, int], stream: int) -> None: ...
def cuda_ternary_sums(fields: dict[str, int], stream: int) -> None: ...
def round_block(block: dict[str, int], grid: dict[str, int], threads: int) -> None: ...
def choose_grid(target: dict[str, int], grid: dict[str, int], threads: int) -> None: ...
def ternary_sums(fields: dict[str, int], threads: int) -> None: ...
