"""Tiny random models of every supported family, and packed versions of them built by the simplest possible means."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from qmoe_core import _C
from qmoe_core.formats import IntFormat, IntMatrix, PackedTensor

FAMILIES = ("qwen3_moe", "mixtral", "olmoe", "deepseek_v3", "gpt_oss", "switch_transformers")
FUSED = FAMILIES[:-1]
COMMON: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 40,  # neither a multiple of a group nor of a vector: ragged tails everywhere
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
SPECIFIC: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_experts": 5, "moe_intermediate_size": 24, "head_dim": 8, "decoder_sparse_step": 1},
    "mixtral": {"num_local_experts": 4, "head_dim": 8},
    "olmoe": {"num_experts": 6},
    "deepseek_v3": {
        "moe_intermediate_size": 20,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "num_key_value_heads": 4,
    },
    "gpt_oss": {"num_local_experts": 4, "head_dim": 8, "sliding_window": 16},
    "switch_transformers": {
        "vocab_size": 96,
        "d_model": 40,
        "d_ff": 24,
        "d_kv": 8,
        "num_heads": 4,
        "num_layers": 2,
        "num_decoder_layers": 2,
        "num_sparse_encoder_layers": 1,
        "num_sparse_decoder_layers": 1,
        "num_experts": 4,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "decoder_start_token_id": 0,
    },
}


def tiny_model(family: str, seed: int = 0, **changes: Any) -> Any:
    """A random float32 model of the family, in evaluation mode, with weights large enough that experts matter."""
    import transformers

    torch.manual_seed(seed)
    common = {} if family == "switch_transformers" else COMMON
    config = transformers.AutoConfig.for_model(family, **{**common, **SPECIFIC[family], **changes})
    auto = transformers.AutoModelForSeq2SeqLM if config.is_encoder_decoder else transformers.AutoModelForCausalLM
    model = auto.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.2)
            elif name.endswith("bias"):
                parameter.normal_(0.0, 0.1)
    return model


def pack(weight: torch.Tensor, bits: int = 4, group: int = 32, half_step: bool = False) -> PackedTensor:
    """Round (E, N, K) float weights to nearest and pack them."""
    fmt = IntFormat(bits, group, half_step=half_step)
    matrices = []
    for matrix in weight.detach().float().numpy():
        codes, scales, zeros = _C.rtn_int(np.ascontiguousarray(matrix), bits, group, True, fmt.scale_dtype, half_step)
        matrices.append(IntMatrix(fmt, codes, scales, zeros))
    return PackedTensor.pack(matrices)


def unpack(packed: PackedTensor) -> torch.Tensor:
    """(E, N, K) float32 weights of a record, by the scalar reference decoder."""
    return torch.from_numpy(np.stack([packed.decode(e) for e in range(packed.experts)]))


def expert_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Every module whose weights the tests pack: fused experts, or the expert linears of Switch Transformers."""
    fused = {n: m for n, m in model.named_modules() if hasattr(m, "_apply_gate")}
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and ".experts.expert_" in n}
    return fused or linears


def pack_modules(model: nn.Module, **options: Any) -> dict[str, dict[str, PackedTensor]]:
    """Pack all expert weights and, so that `model` is the exact reference, put the decoded values back into it."""
    result: dict[str, dict[str, PackedTensor]] = {}
    for name, module in expert_modules(model).items():
        result[name] = {}
        keys = ["weight"] if isinstance(module, nn.Linear) else [module_first(module), "down_proj"]
        for key in keys:
            parameter = getattr(module, key)
            transposed = getattr(module, "is_transposed", False)
            dense = parameter.detach().transpose(1, 2) if transposed else parameter.detach()
            packed = pack(dense if dense.dim() == 3 else dense[None], **options)
            decoded = unpack(packed)
            decoded = decoded.transpose(1, 2) if transposed else decoded
            with torch.no_grad():
                parameter.copy_(decoded.view_as(parameter))
            result[name][key] = packed
    return result


def module_first(module: Any) -> str:
    return "gate_up_proj" if module.has_gate else "up_proj"


def write_checkpoint(model: Any, packed: dict[str, dict[str, PackedTensor]], directory: Path) -> Path:
    """A compressed checkpoint: what `model.save_pretrained` writes, with expert weights replaced by packed records."""
    model.save_pretrained(directory)
    file = directory / "model.safetensors"
    tensors = {k: v for k, v in load_file(file).items() if ".experts." not in k or k.endswith("_bias")}
    table: dict[str, Any] = {}
    for name, entry in packed.items():
        kind = "linear" if "weight" in entry else "experts"
        table[name] = {"kind": kind, "tensors": {}}
        for key, record in entry.items():
            tensors[f"{name}.{key}_qmoe"] = torch.from_numpy(record.data)
            shape = [record.experts, record.rows, record.cols]
            table[name]["tensors"][key] = {"shape": shape, "nbytes": record.nbytes, "format": "int4-g32"}
    save_file(tensors, file, metadata={"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "qmoe", "version": 1, "packed": table}
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    return directory


def inputs_for(model: Any, length: int = 12, batch: int = 2) -> dict[str, torch.Tensor]:
    """Token ids for one forward pass."""
    ids = torch.randint(3, 96, (batch, length), generator=torch.Generator().manual_seed(7))
    return (
        {"input_ids": ids, "decoder_input_ids": ids.flip(1)} if model.config.is_encoder_decoder else {"input_ids": ids}
    )
