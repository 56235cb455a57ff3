"""Loads a checkpoint in the published layout: config.json, safetensors weights, draft adapter."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from nld_cuda.model.config import DTYPES, ModelConfig
from nld_cuda.model.fp8 import scaled_product
from nld_cuda.model.fp8_files import Fp8Files
from nld_cuda.model.images import ImageProcessor
from nld_cuda.model.int4_files import Int4Files
from nld_cuda.model.linear import Lora, QuantizedMatrix, Weight
from nld_cuda.model.lora import ADAPTER_FOLDER, load_lora
from nld_cuda.model.quantization import Fp8Config, Int4Config
from nld_cuda.model.tensor_files import Piece, Progress, TensorFiles, checkpoint_files
from nld_cuda.model.transformer import Layer, NLDModel
from nld_cuda.model.vision import VisionEncoder, vision_shapes
from nld_cuda.parallel.group import local_device
from nld_cuda.parallel.shard import Shard


@dataclass(frozen=True)
class Row:
    """One tensor of a checkpoint.

    Attributes:
        name: its published name, `{i}` for the layer.
        field: attribute of NLDModel or, with `{i}` in the name, of Layer. Rows with the same field
            lie one below the other in it, in the order of the table.
        shape: names of the sizes, see `_sizes`.
    """

    name: str
    field: str
    shape: tuple[str, ...]


TABLE = (
    Row("encoder.embed_tokens.weight", "embed", ("vocab", "hidden")),
    Row("encoder.layers.{i}.input_layernorm.weight", "input_norm", ("hidden",)),
    Row("encoder.layers.{i}.self_attn.q_proj.weight", "qkv", ("q", "hidden")),
    Row("encoder.layers.{i}.self_attn.k_proj.weight", "qkv", ("kv", "hidden")),
    Row("encoder.layers.{i}.self_attn.v_proj.weight", "qkv", ("kv", "hidden")),
    Row("encoder.layers.{i}.self_attn.o_proj.weight", "o", ("hidden", "q")),
    Row("encoder.layers.{i}.post_attention_layernorm.weight", "mlp_norm", ("hidden",)),
    Row("encoder.layers.{i}.mlp.gate_proj.weight", "gate_up", ("inner", "hidden")),
    Row("encoder.layers.{i}.mlp.up_proj.weight", "gate_up", ("inner", "hidden")),
    Row("encoder.layers.{i}.mlp.down_proj.weight", "down", ("hidden", "inner")),
    Row("encoder.norm.weight", "norm", ("hidden",)),
    Row("diffusion_head.weight", "head", ("vocab", "hidden")),
)

# Prefixes other layouts use, and the published ones; applied in this order, each at most once.
RENAMED_PREFIXES = (
    ("language_model.", ""),
    ("model.", "encoder."),
    ("lm_head.", "diffusion_head."),
    ("encoder.language_model.model.", "encoder."),
    ("encoder.language_model.", "encoder."),
    ("vision_tower.", "encoder.vision_tower."),
    ("multi_modal_projector.", "encoder.multi_modal_projector."),
)

EMBEDDING = "encoder.embed_tokens.weight"  # looked up, not multiplied: never quantised

# How products with quantised weights are computed; see `load_model`.
PRODUCTS = ("auto", "dense", "fp8")

# Tensors that hold no weight: old files store the rotary frequencies that config.json implies.
IGNORED = re.compile(r".*\.rotary_emb\.inv_freq")


class StoredFormat(Protocol):
    """A way in which checkpoints store quantised matrices."""

    def holds(self, name: str) -> bool:
        """Whether the matrix `name` is stored so; told by the tensors that are there."""

    def stored(
        self, name: str, shape: tuple[int, ...]
    ) -> dict[str, tuple[tuple[int, ...], tuple[str, ...]]]:
        """Name, shape and possible dtypes of each stored tensor of a matrix `[out, in]`."""

    def matrix(
        self, pieces: dict[str, Piece], device: torch.device, products: str
    ) -> QuantizedMatrix | None:
        """One matrix of all that `pieces` names, one below the other; None: has to be dense."""

    def copy_to(self, name: str, target: Tensor, piece: Piece) -> None:
        """Write the dense piece, each weight rounded once to the dtype of `target`."""


def canonical_name(name: str) -> str:
    """Return the published name of a tensor of any known layout."""
    for prefix, published in RENAMED_PREFIXES:
        if name.startswith(prefix):
            name = published + name.removeprefix(prefix)
    return name


def load_model(
    path: str | Path,
    device: torch.device | str = "auto",
    dtype: torch.dtype | str = "auto",
    lora: str | Path | None = "auto",
    *,
    products: str = "auto",
    progress: Progress | None = None,
    process_group: Any = None,
) -> NLDModel:
    """Load the weights of a checkpoint folder.

    Files are memory-mapped and copied piece by piece to their final place: memory peaks at the size
    of the loaded weights. Quantised matrices stay as stored where the model computes in bfloat16
    (then also the default) and there is a product for them; else they are expanded.

    Args:
        path: folder with config.json and model.safetensors or model.safetensors.index.json.
        device: "auto" is CUDA where torch has one and libnld_ops.so kernels for it, else the CPU.
        dtype: of all weights; "auto" is the checkpoint's own. float32, bfloat16 or float16.
        lora: draft adapter: a folder in PEFT layout, None for none; "auto" is `linear_spec_lora` in
            `path` where there is one.
        products: with quantised weights. "auto": activations are rounded to fp8 only where the
            checkpoint asks for it and the GPU multiplies fp8. "dense": weights are expanded on
            loading, which takes their memory. "fp8" (fp8 weights only): activations are always
            rounded, by a scale per token where the checkpoint has none.
        progress: called with (bytes done, bytes in all, of dense weights) now and then.
        process_group: a torch.distributed.ProcessGroup: this process reads its part only, see
            `parallel.shard`; "cuda" is then cuda:LOCAL_RANK. None: all of the model.

    Raises:
        FileNotFoundError: a folder or file is missing.
        ValueError: config.json breaks a rule; a file is corrupt; tensors are unknown, missing or of
            the wrong shape (all are listed); device, dtype or products is unknown, or products
            is "fp8" and weights are not; the model cannot be divided by the number of processes.
        NotImplementedError: the checkpoint, or the device, needs what this package does not have.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise FileNotFoundError(f"load: path must be a checkpoint folder, got {folder}")
    config = ModelConfig.from_file(folder)
    shard = None if process_group is None else Shard.of(config, process_group)
    files = TensorFiles(checkpoint_files(folder), canonical_name)
    tied = config.tie_word_embeddings
    vision = vision_shapes(config)
    stored_format = _stored_format(files, config)
    quantised = check_tensors(files, config, stored_format)
    target_device = resolve_device(device)
    if shard is not None and target_device == torch.device("cuda"):
        target_device = local_device(process_group)
    target_dtype = _resolve_dtype(dtype, config, files)
    _check_products(products, config, target_device, target_dtype)
    stays = products != "dense" and target_dtype == torch.bfloat16

    parameters: dict[Place, Weight] = {}
    pieces = _pieces(config, shard) | {name: Piece.whole(shape) for name, shape in vision.items()}
    done, total = 0, sum(_count(p.size) for p in pieces.values()) * target_dtype.itemsize
    for place, names in _by_place(_plan(config) | _vision_plan(config)).items():
        wanted = {name: pieces[name] for name in names}
        parameter: Weight | None = None
        if stays and stored_format is not None and quantised.issuperset(wanted):
            parameter = stored_format.matrix(wanted, target_device, products)
        if parameter is None:
            parameter = _read_dense(
                files, stored_format, quantised, wanted, target_device, target_dtype
            )
        parameters[place] = parameter
        done += sum(_count(p.size) for p in wanted.values()) * target_dtype.itemsize
        if progress is not None:
            progress(done, total)
    embed, norm = parameters[None, "embed"], parameters[None, "norm"]
    assert isinstance(embed, Tensor) and isinstance(norm, Tensor)  # no format holds them
    if tied and "diffusion_head.weight" in files:
        _check_tied(files, embed, pieces[EMBEDDING], folder)

    adapter_folder = _adapter_folder(folder, lora)
    adapters: list[Lora] | list[None] = [None] * config.num_layers
    if adapter_folder is not None:
        adapters = load_lora(adapter_folder, config, target_device, target_dtype, shard)
    fields = list(dict.fromkeys(row.field for row in TABLE if "{i}" in row.name))
    layers = [
        Layer(
            **{field: parameters[i, field] for field in fields},  # type: ignore[arg-type]
            lora=adapters[i],
        )
        for i in range(config.num_layers)
    ]
    head = embed if tied else parameters[None, "head"]
    model = NLDModel(shard.config if shard else config, embed, layers, norm, head, shard)
    if config.vision is not None:
        tensors: dict[str, Any] = {name: parameters[None, name] for name in vision}
        processor = ImageProcessor.from_folder(folder, config.vision)
        model.vision = VisionEncoder(config, tensors, processor)
    return model


def check_tensors(
    files: TensorFiles, config: ModelConfig, stored_format: StoredFormat | None = None
) -> set[str]:
    """Compare files with what config.json implies; return the names of quantised matrices.

    Raises:
        ValueError: tensors are unknown, missing, or of a wrong shape or dtype; all are listed.
    """
    expected: dict[str, tuple[int, ...]] = {}
    dtypes: dict[str, tuple[str, ...]] = {}
    quantised = set()
    matrices = matrix_shapes(config)
    for name, (_, _, shape) in (_plan(config) | _vision_plan(config)).items():
        is_matrix = name in matrices and name != EMBEDDING
        if stored_format is None or not is_matrix or not stored_format.holds(name):
            expected[name] = shape
            continue
        quantised.add(name)
        for stored, (stored_shape, possible) in stored_format.stored(name, shape).items():
            expected[stored], dtypes[stored] = stored_shape, possible
    extra = {"diffusion_head.weight"} if config.tie_word_embeddings else set()
    files.check(expected, lambda name: name in extra or IGNORED.fullmatch(name) is not None, dtypes)
    return quantised


def resolve_device(device: torch.device | str) -> torch.device:
    """Return the device to use, one this build has kernels for. Raises as `load_model`."""
    has_kernels = torch._C._dispatch_has_kernel_for_dispatch_key("nld::rope_append_", "CUDA")
    if device == "auto":
        return torch.device("cuda" if has_kernels and torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise ValueError(f"load: device must be auto, cpu or cuda, got {device!r}") from None
    if chosen.type not in ("cpu", "cuda"):
        raise NotImplementedError(f"load: device must be auto, cpu or cuda, got {device}")
    if chosen.type == "cuda" and not has_kernels:
        raise NotImplementedError(
            f"load: device must be cpu, this libnld_ops.so has no CUDA kernels, got {device}"
        )
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"load: device must be cpu, torch finds no CUDA device here, got {device}")
    return chosen


def _resolve_dtype(
    dtype: torch.dtype | str, config: ModelConfig, files: TensorFiles
) -> torch.dtype:
    if dtype == "auto":
        found = config.dtype or files.dtype(EMBEDDING)
        if config.quantization is not None:
            found = torch.bfloat16  # what quantised products take
    else:
        found = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if found not in DTYPES.values():
        raise ValueError(f"load: dtype must be auto, {', '.join(DTYPES)}, got {dtype}")
    assert found is not None  # for the type checker; None is no value of DTYPES
    return found


def _sizes(config: ModelConfig) -> dict[str, int]:
    return {
        "vocab": config.vocab_size,
        "hidden": config.hidden_size,
        "inner": config.intermediate_size,
        "q": config.q_size,
        "kv": config.kv_size,
    }


Place = tuple[int | None, str]  # layer (None outside) and field
Plan = dict[str, tuple[int | None, str, tuple[int, ...]]]  # name -> (layer, field, shape)


def _plan(config: ModelConfig, sizes: dict[str, int] | None = None) -> Plan:
    """Expand the table: every expected tensor with its layer (None outside), field and shape."""
    sizes = _sizes(config) if sizes is None else sizes
    plan: Plan = {}
    for row in TABLE:
        if row.field == "head" and config.tie_word_embeddings:
            continue
        shape = tuple(sizes[size] for size in row.shape)
        for i in range(config.num_layers) if "{i}" in row.name else (None,):
            plan[row.name.format(i=i)] = (i, row.field, shape)
    return plan


def _pieces(config: ModelConfig, shard: Shard | None) -> dict[str, Piece]:
    """Every expected tensor's piece: all of it without a shard."""
    sizes = _sizes(config) if shard is None else shard.sizes
    begins = dict.fromkeys(sizes, 0) if shard is None else shard.begins
    plans = (_plan(config), _plan(config, begins), _plan(config, sizes))
    return {name: Piece(*(plan[name][2] for plan in plans)) for name in plans[0]}


def _vision_plan(config: ModelConfig) -> Plan:
    """The tensors of the vision tower, each a parameter of its own."""
    return {name: (None, name, shape) for name, shape in vision_shapes(config).items()}


def matrix_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Canonical name and shape `[out, in]` of every matrix of a checkpoint."""
    return {name: shape for name, (_, _, shape) in _plan(config).items() if len(shape) == 2}


def _by_place(plan: Plan) -> dict[Place, list[str]]:
    """Names of the tensors of each parameter, whose rows lie one below the other, in order."""
    names: dict[Place, list[str]] = {}
    for name, (layer, field, _) in plan.items():
        names.setdefault((layer, field), []).append(name)
    return names


def _stored_format(files: TensorFiles, config: ModelConfig) -> StoredFormat | None:
    if isinstance(config.quantization, Int4Config):
        return Int4Files(files, config.quantization)
    if isinstance(config.quantization, Fp8Config):
        return Fp8Files(files, config.quantization)
    return None


def _check_products(
    products: str, config: ModelConfig, device: torch.device, dtype: torch.dtype
) -> None:
    if products not in PRODUCTS:
        raise ValueError(f"load: products must be {', '.join(PRODUCTS)}, got {products!r}")
    if products != "fp8":
        return
    if not isinstance(config.quantization, Fp8Config) or config.quantization.weights == "block":
        raise ValueError(
            "load: products must be auto or dense, fp8 needs weights in fp8 with a scale per "
            "tensor or output, got 'fp8'"
        )
    if dtype != torch.bfloat16:
        raise ValueError(f"load: dtype must be bfloat16 for fp8 products, got {dtype}")
    if scaled_product(device) is None:
        raise NotImplementedError(
            f"load: products must be auto or dense, {device} does not multiply fp8, got 'fp8'"
        )


def _read_dense(
    files: TensorFiles,
    stored_format: StoredFormat | None,
    quantised: set[str],
    pieces: dict[str, Piece],
    device: torch.device,
    dtype: torch.dtype,
) -> Tensor:
    """One parameter from the tensors whose rows it holds, dense."""
    rows = sum(piece.size[0] for piece in pieces.values())
    weight = torch.empty((rows, *next(iter(pieces.values())).size[1:]), dtype=dtype, device=device)
    begin = 0
    for name, piece in pieces.items():
        target = weight[begin : begin + piece.size[0]]
        if stored_format is not None and name in quantised:
            stored_format.copy_to(name, target, piece)
        else:
            files.copy_to(name, target, piece)
        begin += piece.size[0]
    return weight


def _count(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


def _check_tied(files: TensorFiles, embed: Tensor, piece: Piece, folder: Path) -> None:
    name = "diffusion_head.weight"
    head = torch.empty_like(embed) if files.shape(name) == piece.shape else None
    if head is not None:
        files.copy_to(name, head, piece)
    if head is None or not torch.equal(head, embed):
        raise ValueError(
            f"{folder}: {name} must equal the embedding where tie_word_embeddings is true, "
            "got other values"
        )


def _adapter_folder(folder: Path, lora: str | Path | None) -> Path | None:
    if lora is None:
        return None
    if lora == "auto":
        found = folder / ADAPTER_FOLDER
        if not found.is_dir() and os.path.lexists(found):
            raise FileNotFoundError(f"{found}: must be an adapter folder, found something else")
        return found if found.is_dir() else None
    if not Path(lora).is_dir():
        raise FileNotFoundError(f"load: lora must be auto, None or an adapter folder, got {lora}")
    return Path(lora)
