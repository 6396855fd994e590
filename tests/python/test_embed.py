"""The C++ side as another program sees it: install, find_package(qmoe), link, open a compressed checkpoint, multiply.

Needs CMake and a C++ compiler, as installing from source does; no torch. QMOE_BUILD_DIR names an existing build to
install from.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from qmoe_core.formats import IntFormat, IntMatrix, PackedTensor, TernaryFormat, TernaryMatrix

ROOT = Path(__file__).resolve().parents[2]
EXPERTS, ROWS, COLS = 3, 37, 150


def tool(name: str) -> str:
    """A program on the path or among the scripts of this Python."""
    found = shutil.which(name) or shutil.which(name, path=sysconfig.get_path("scripts"))
    assert found, f"{name} is needed to build the example: pip install {name}"
    return found


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)


def cmake(*arguments: str | Path) -> None:
    result = run(tool("cmake"), *arguments)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example, built against an installed qmoe and nothing else of this tree."""
    work = tmp_path_factory.mktemp("embed")
    generator = ("-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}")
    build = os.environ.get("QMOE_BUILD_DIR")
    if build is None:
        build = str(work / "library")
        cmake("-S", ROOT, "-B", build, *generator, "-DQMOE_PYTHON=OFF", "-DQMOE_CUDA=OFF")
        cmake("--build", build, "-j", "2")
    cmake("--install", build, "--prefix", work / "prefix", "--component", "development")
    shutil.copytree(ROOT / "cpp" / "examples" / "embed", work / "source")
    cmake("-S", work / "source", "-B", work / "build", *generator, f"-DCMAKE_PREFIX_PATH={work / 'prefix'}")
    cmake("--build", work / "build")
    return work / "build" / "qmoe_embed"


def packed_tensors() -> dict[str, PackedTensor]:
    random = np.random.default_rng(5)
    int_format = IntFormat(4, 32)
    groups = -(-COLS // 32)
    ints = [
        IntMatrix(
            int_format,
            random.integers(0, 16, (ROWS, COLS), dtype=np.uint8),
            (random.integers(1, 64, (ROWS, groups)) / 256).astype(np.float32),
            random.integers(0, 16, (ROWS, groups), dtype=np.uint8),
        )
        for _ in range(EXPERTS)
    ]
    ternary = [
        TernaryMatrix(
            TernaryFormat(),
            random.choice(np.array([-1, 0, 1], np.int8), (ROWS, COLS), p=[0.1, 0.8, 0.1]),
            (random.integers(1, 64, (ROWS, 2)) * [-1, 1] / 64).astype(np.float32),
        )
        for _ in range(EXPERTS)
    ]
    prefix = "model.layers.0.mlp.experts."
    return {
        prefix + "down_proj_qmoe": PackedTensor.pack(ints),
        prefix + "gate_up_proj_qmoe": PackedTensor.pack(ternary),
    }


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Two shards and their index, each with a packed tensor and a plain one."""
    weight_map = {}
    for number, (name, tensor) in enumerate(packed_tensors().items(), start=1):
        shard = f"model-{number:05}-of-00002.safetensors"
        plain = f"model.norm{number}.weight"
        save_file({name: tensor.data, plain: np.ones(7, np.float32)}, tmp_path / shard)
        weight_map |= {name: shard, plain: shard}
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    return tmp_path


def expected(tensor: PackedTensor, expert: int) -> tuple[float, float]:
    x = (np.arange(tensor.cols) % 17 - 8) / 8
    y = tensor.decode(expert).astype(np.float64) @ x
    return float(y.sum()), float(np.linalg.norm(y))


def printed(output: str) -> dict[str, str]:
    return dict(line.split(": ", 1) for line in output.splitlines())


def test_every_expert_of_both_formats_multiplies_as_numpy_does(program: Path, checkpoint: Path) -> None:
    for name, tensor in packed_tensors().items():
        for expert in range(EXPERTS):
            result = run(program, checkpoint, name, str(expert))
            assert result.returncode == 0, result.stderr
            lines = printed(result.stdout)
            assert lines["packed tensors"] == "2"
            assert lines["experts"].startswith(f"{EXPERTS} rows: {ROWS} columns: {COLS}")
            total, norm = expected(tensor, expert)
            assert float(lines["sum"]) == pytest.approx(total, rel=1e-4, abs=1e-4)
            assert float(lines["norm"]) == pytest.approx(norm, rel=1e-5)
            assert float(lines["norm, prepacked"]) == pytest.approx(norm, rel=1e-5)
            assert float(lines["norm, int8 activations"]) == pytest.approx(norm, rel=1e-2)


def test_the_first_packed_tensor_is_the_default(program: Path, checkpoint: Path) -> None:
    result = run(program, checkpoint)
    assert result.returncode == 0, result.stderr
    assert printed(result.stdout)["tensor"] == "model.layers.0.mlp.experts.down_proj_qmoe"


def test_refusals_name_code_file_and_tensor(program: Path, checkpoint: Path) -> None:
    name = "model.layers.0.mlp.experts.down_proj_qmoe"
    result = run(program, checkpoint / "absent")
    assert result.returncode == 1
    assert result.stderr.startswith("E_MISSING: ")
    result = run(program, checkpoint, name, str(EXPERTS))
    assert result.returncode == 1
    assert result.stderr.startswith("E_VALUE: ")
    shard = checkpoint / "model-00001-of-00002.safetensors"
    data = bytearray(shard.read_bytes())
    at = data.index(packed_tensors()[name].data.tobytes())
    data[at + packed_tensors()[name].nbytes // 2] ^= 1
    shard.write_bytes(data)
    result = run(program, checkpoint, name)
    assert result.returncode == 1
    assert result.stderr.startswith("E_CHECKSUM: ")
    assert name in result.stderr
    assert str(shard) in result.stderr
