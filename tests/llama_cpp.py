"""What llama.cpp computes: by its formulas, and, where it is installed, in llama.cpp itself."""

import inspect
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import gguf
import numpy
import torch

import PruningAndFineTuningColab as nb


@torch.no_grad()
def logits_by_formulas(tensors: dict[str, torch.Tensor], numbers: dict, ids: torch.Tensor) -> torch.Tensor:
    """Logits (time, vocabulary) of ids (time,), as llama.cpp computes them from what is written to a file.

    Its `deci` is Llama; `openelm` normalises queries and keys, has them in one matrix, and no output matrix.
    """
    size, positions = numbers["key_length"], torch.arange(len(ids)).double()
    epsilon = numbers["layer_norm_rms_eps"]
    frequencies = numbers["rope_freq_base"] ** -(torch.arange(0, size, 2).double() / size)
    angles = positions[:, None] * frequencies / tensors.get("rope_freqs.weight", torch.ones(())).double()
    turns = torch.polar(torch.ones_like(angles), angles).to(torch.complex64)

    def norm(x, name):
        return torch.nn.functional.rms_norm(x, x.shape[-1:], tensors[f"{name}.weight"].float(), epsilon)

    def linear(x, name):
        bias = tensors.get(f"{name}.bias")
        return torch.nn.functional.linear(x, tensors[f"{name}.weight"].float(), None if bias is None else bias.float())

    def rotated(x, name):  # (heads, time, size): neighbours are turned together; openelm: halves, which stay so here
        if f"{name}.weight" in tensors:
            x = norm(x, name).unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)
        return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * turns).flatten(-2)

    x = tensors["token_embd.weight"][ids].float()
    for layer, (heads, shared) in enumerate(zip(numbers["head_count"], numbers["head_count_kv"])):
        name = f"blk.{layer}"
        inner, names = norm(x, f"{name}.attn_norm"), [f"{name}.attn_{part}" for part in ("q", "k", "v", "qkv")]
        parts = torch.cat([linear(inner, part) for part in names if f"{part}.weight" in tensors], dim=-1)
        parts = parts.split([heads * size, shared * size, shared * size], dim=-1)
        queries, *others = (part.unflatten(-1, (-1, size)).transpose(0, 1) for part in parts)
        keys, values = (part.repeat_interleave(heads // shared, 0) for part in others)
        queries, keys = rotated(queries, f"{name}.attn_q_norm"), rotated(keys, f"{name}.attn_k_norm")
        read = torch.nn.functional.scaled_dot_product_attention(queries, keys, values, is_causal=True)
        x = x + linear(read.transpose(0, 1).flatten(1), f"{name}.attn_output")
        inner = norm(x, f"{name}.ffn_norm")
        gate = torch.nn.functional.silu(linear(inner, f"{name}.ffn_gate"))
        x = x + linear(gate * linear(inner, f"{name}.ffn_up"), f"{name}.ffn_down")
    return linear(norm(x, "output_norm"), "output" if "output.weight" in tensors else "token_embd")


@torch.no_grad()
def logits_of(small, ids):
    """The model's own logits (time, vocabulary) of ids (time,)."""
    return small.eval()(ids[None], use_cache=False).logits[0].float()


def difference_by_formulas(small, tensors: dict[str, torch.Tensor], numbers: dict, ids: torch.Tensor) -> float:
    """The largest difference of logits_by_formulas() of ids (time,) from the model's, relative to the largest logit."""
    wanted = logits_of(small, ids)
    return ((logits_by_formulas(tensors, numbers, ids) - wanted).abs().max() / wanted.abs().max()).item()


def read_gguf(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a .gguf file in float32, by name."""
    return {
        tensor.name: torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
        for tensor in gguf.GGUFReader(path).tensors
    }


def why_no_llama_cpp() -> str:
    try:
        from llama_cpp_py_sync import Llama

        Llama.print_system_info()
    except ImportError:
        return "pip install -r tests/requirements-llama.txt"
    except RuntimeError as error:  # it wants a newer libc than Debian 12 has
        return str(error)
    return ""


def rows_of(model, ids: list[int]):
    """Logits (time, vocabulary) of ids, in llama.cpp."""
    batch = model._lib.llama_batch_init(len(ids), 0, 1)
    batch.n_tokens = len(ids)
    for place, token in enumerate(ids):
        batch.token[place], batch.pos[place], batch.n_seq_id[place] = token, place, 1
        batch.seq_id[place][0], batch.logits[place] = 0, 1
    if model._lib.llama_decode(model._ctx, batch):
        raise SystemExit("llama.cpp cannot compute it")
    rows = (model._lib.llama_get_logits_ith(model._ctx, place) for place in range(len(ids)))
    rows = numpy.stack([numpy.frombuffer(model._ffi.buffer(row, 4 * model.n_vocab), "float32") for row in rows])
    model._lib.llama_batch_free(batch)
    return rows


def run_llama_cpp(file: str, folder: str) -> None:
    """Runs in a process of its own, because llama.cpp ends it where it does not like a file.

    Of `asked.json` in a folder (ids, text) it writes `logits.npy` (time, vocabulary), and `tokens.json` of the text.
    """
    from llama_cpp_py_sync import Llama

    asked = json.loads(Path(folder, "asked.json").read_text())
    model = Llama(file, n_ctx=len(asked["ids"]), n_batch=len(asked["ids"]))
    numpy.save(Path(folder, "logits.npy"), rows_of(model, asked["ids"]))
    Path(folder, "tokens.json").write_text(json.dumps(model.tokenize(asked["text"], add_special=False)))


def divergence_in_llama_cpp(file: Path, small, tokenizer, ids: torch.Tensor) -> float:
    """Of its logits of ids (time,) from the model's. Raises RuntimeError if it is not opened, or has other tokens."""
    text = tokenizer.decode(ids, skip_special_tokens=True)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "asked.json").write_text(json.dumps({"ids": ids.tolist(), "text": text}))
        sources = inspect.getsource(rows_of) + inspect.getsource(run_llama_cpp)
        code = f"import json, numpy\nfrom pathlib import Path\n{sources}\nrun_llama_cpp({str(file)!r}, {folder!r})"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, errors="replace")
        if done.returncode:
            raise RuntimeError(f"llama.cpp cannot open {file} ({done.stderr.strip()[-300:]})")
        given = torch.from_numpy(numpy.load(Path(folder, "logits.npy")))[None]
        tokens = json.loads(Path(folder, "tokens.json").read_text())
    wanted = logits_of(small, ids)[None]
    if len(tokens) <= 20 or tokens != tokenizer(text, add_special_tokens=False).input_ids:
        raise RuntimeError(f"{file} has other tokens in llama.cpp")
    return nb.divergence(given, wanted).item()
