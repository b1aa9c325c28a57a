"""How fast the core of `encode` is: forward passes for the CLS embedding, beside other ways of running them.

timm, torchvision and transformers in PyTorch; in float32 on a processor also onnxruntime and OpenVINO, from timm's
network exported to ONNX, with as many threads as PyTorch and float32 asked for (on some processors OpenVINO would take
bfloat16). The extra `bench` installs all of them; without onnxruntime or OpenVINO the script says so and goes on.

    python benchmarks/encode.py                      # S/16, 224 x 224, float32, batches of 16, on the processor
    python benchmarks/encode.py --arch B/16 --batch 8 --repeats 5
    python benchmarks/encode.py --device cuda --dtype bfloat16 --batch 512

Tensors are in memory already, of the type of the weights. All libraries have the same weights: their outputs prove it
in float32 on the processor, before anything is moved or cast. They take turns within one process; a figure is the ratio
of medians. On a GPU there is also the share that each reaches of its matrix peak, that of one large matrix product,
measured in the same run. About two minutes on two cores.
"""

import argparse
import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
import transformers
from timing import alternate, machine, print_ratios
from torch import Tensor, nn

from vitembed.architecture import ViTConfig
from vitembed.vit import ViT

Network = Callable[[Tensor], Tensor]

TIMM = {"Ti/16": "tiny_patch16", "S/16": "small_patch16", "B/16": "base_patch16", "B/32": "base_patch32"}


class Cls(nn.Module):
    """A network and how the CLS embedding is read from its output; moved and cast as one."""

    def __init__(self, network: nn.Module, read: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.network = network
        self.read = read

    def forward(self, images: Tensor) -> Tensor:
        """Return (B, W) for (B, C, H, W) images."""
        return self.read(self.network(images))


def from_timm(ours: ViT, name: str) -> nn.Module:
    """Return timm's network, which gives the CLS token where it has no classes."""
    model = timm.create_model(f"vit_{TIMM[name]}_224", num_classes=0)
    model.load_state_dict(ours.state_dict())
    return model.eval()


def to_onnx(network: nn.Module, images: Tensor, path: Path) -> None:
    """Write a network for batches of the images' size."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the older exporter, which needs nothing but PyTorch
        torch.onnx.export(network, (images,), path, input_names=["images"], output_names=["cls"], dynamo=False)


def from_onnxruntime(path: Path, threads: int) -> Network | None:
    """Return onnxruntime's forward pass."""
    try:
        import onnxruntime
    except ImportError:
        return None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def from_openvino(path: Path, threads: int) -> Network | None:
    """Return OpenVINO's forward pass."""
    try:
        import openvino
    except ImportError:
        return None
    settings = {
        "INFERENCE_PRECISION_HINT": "f32",
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": threads,
    }
    request = openvino.Core().compile_model(path, "CPU", settings).create_infer_request()
    return lambda images: torch.from_numpy(request.infer([images.numpy()])[0].copy())


def from_torchvision(ours: ViT) -> nn.Module:
    """Return torchvision's, without its classification head."""
    config = ours.config
    model = torchvision.models.VisionTransformer(
        image_size=config.image_size[0],
        patch_size=config.patch_size,
        num_layers=config.depth,
        num_heads=config.heads,
        hidden_dim=config.width,
        mlp_dim=4 * config.width,
    )
    model.heads = nn.Identity()
    state = ours.state_dict()
    renamed = {
        "class_token": state["cls_token"],
        "conv_proj.weight": state["patch_embed.proj.weight"],
        "conv_proj.bias": state["patch_embed.proj.bias"],
        "encoder.pos_embedding": state["pos_embed"],
        "encoder.ln.weight": state["norm.weight"],
        "encoder.ln.bias": state["norm.bias"],
    }
    parts = {
        "norm1.weight": "ln_1.weight",
        "norm1.bias": "ln_1.bias",
        "norm2.weight": "ln_2.weight",
        "norm2.bias": "ln_2.bias",
        "attn.qkv.weight": "self_attention.in_proj_weight",
        "attn.qkv.bias": "self_attention.in_proj_bias",
        "attn.proj.weight": "self_attention.out_proj.weight",
        "attn.proj.bias": "self_attention.out_proj.bias",
        "mlp.fc1.weight": "mlp.0.weight",
        "mlp.fc1.bias": "mlp.0.bias",
        "mlp.fc2.weight": "mlp.3.weight",
        "mlp.fc2.bias": "mlp.3.bias",
    }
    for i in range(config.depth):
        for part, theirs in parts.items():
            renamed[f"encoder.layers.encoder_layer_{i}.{theirs}"] = state[f"blocks.{i}.{part}"]
    model.load_state_dict(renamed)
    return model.eval()


def from_transformers(ours: ViT) -> nn.Module:
    """Return transformers' ViTModel with fused attention; its weights are set by order and checked by its output."""
    config = ours.config
    model = transformers.ViTModel(
        transformers.ViTConfig(
            hidden_size=config.width,
            num_hidden_layers=config.depth,
            num_attention_heads=config.heads,
            intermediate_size=4 * config.width,
            image_size=config.image_size[0],
            patch_size=config.patch_size,
            layer_norm_eps=1e-6,
            attn_implementation="sdpa",
        ),
        add_pooling_layer=False,
    )
    copy_by_order(ours, model)
    return Cls(model, lambda output: output.last_hidden_state[:, 0]).eval()


def copy_by_order(ours: ViT, model: nn.Module) -> None:
    """Copy weights into a model with separate query, key and value, whatever it calls them."""
    width = ours.config.width
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            tensor.copy_(source_of(name, ours.state_dict(), width))


def source_of(name: str, state: dict[str, Tensor], width: int) -> Tensor:
    """Return the slice of our weights that a parameter of transformers stands for."""
    kind = name.rsplit(".", 1)[1]
    if "cls_token" in name:
        return state["cls_token"]
    if "position" in name:
        return state["pos_embed"]
    if "projection" in name:
        return state[f"patch_embed.proj.{kind}"]
    number = next((part for part in name.split(".") if part.isdigit()), None)
    if number is None:
        return state[f"norm.{kind}"]
    for offset, words in enumerate((("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj"))):
        if any(word in name for word in words):
            return state[f"blocks.{number}.attn.qkv.{kind}"][offset * width : (offset + 1) * width]
    for ours, words in {
        "norm1": ("layernorm_before",),
        "norm2": ("layernorm_after",),
        "mlp.fc1": ("intermediate", "fc1"),
        "attn.proj": ("attention.output", "o_proj"),
        "mlp.fc2": ("output.dense", "fc2"),
    }.items():
        if any(word in name for word in words):
            return state[f"blocks.{number}.{ours}.{kind}"]
    raise KeyError(name)


def in_pytorch(arch: str) -> dict[str, nn.Module]:
    """Return our network and its PyTorch peers: modules that give the CLS embedding, with the same random weights."""
    ours = ViT.from_config(arch)
    return {
        "vitembed": Cls(ours, lambda output: output.cls).eval(),
        "timm": from_timm(ours, arch),
        "torchvision": from_torchvision(ours),
        "transformers": from_transformers(ours),
    }


def onnx_peers(network: nn.Module, images: Tensor) -> dict[str, Network]:
    """Return the peers that run an exported network, those that are installed."""
    peers = {}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "vit.onnx"
        to_onnx(network, images, file)
        for name, build in {"onnxruntime": from_onnxruntime, "openvino": from_openvino}.items():
            if (peer := build(file, torch.get_num_threads())) is not None:
                peers[name] = peer
            else:
                print(f"{name} is not installed and left out")
    return peers


def check(networks: Mapping[str, Network], images: Tensor) -> None:
    """Hold the outputs of all against timm's."""
    expected = networks["timm"](images)
    for name, network in networks.items():
        difference = (network(images) - expected).abs().max().item()
        assert difference < 1e-4, f"{name} computes something else: {difference}"


def synchronise(device: str) -> None:
    """Wait until a GPU has done what it was told."""
    if device != "cpu":
        torch.cuda.synchronize(device)


def forward_flops(config: ViTConfig) -> int:
    """Return the floating-point operations of the matrix products of a whole forward pass for one image.

    For T = 1 + N tokens of width W, an addition and a multiplication counted as two: in each block 24 T W^2 of the
    linear layers (3 W^2 weights for queries, keys and values, W^2 after the attention, 8 W^2 in the MLP) and 4 T^2 W of
    the attention; before the blocks 2 N W C p^2 of the patch projection.
    """
    tokens, width = 1 + config.patches, config.width
    block = 24 * tokens * width**2 + 4 * tokens**2 * width
    return config.depth * block + 2 * config.patches * width * config.channels * config.patch_size**2


def matrix_peak(device: str, dtype: torch.dtype, side: int = 8192) -> float:
    """Return the operations a second of a product of two square matrices: what a device can do, measured."""
    left, right = torch.randn(2, side, side, device=device, dtype=dtype)

    def multiply() -> None:
        torch.mm(left, right)
        synchronise(device)

    return 2 * side**3 / alternate({"product": multiply}, repeats=20)["product"]


def print_shares(times: Mapping[str, float], *, flops: float, peak: float) -> None:
    """Print how much of the peak each reaches; `flops` is what a batch takes."""
    print(f"matrix peak, measured: {peak / 1e12:.1f} TFLOP/s; shares of it, a whole forward pass counted for all,")
    print("of which vitembed leaves out the rows of the last block that the CLS token does not need:")
    for name, seconds in times.items():
        print(f"{name:<16}{flops / seconds / peak:>10.1%}")


def measure(networks: Mapping[str, Network], images: Tensor, device: str, repeats: int) -> dict[str, float]:
    """Return the median seconds of each, which take turns."""

    def timed(network: Network) -> Callable[[], None]:
        def run() -> None:
            network(images)
            synchronise(device)

        return run

    return alternate({name: timed(network) for name, network in networks.items()}, repeats=repeats)


def main() -> None:
    """Check that all libraries give the same embeddings, time them in turn, and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="S/16", choices=sorted(TIMM))
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=15, help="timed rounds, in which each has one turn")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:1")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    options = parser.parse_args()
    device, dtype = options.device, getattr(torch, options.dtype)

    torch.manual_seed(0)
    modules = in_pytorch(options.arch)
    images = torch.randn(options.batch, 3, 224, 224)
    exported = onnx_peers(modules["timm"], images) if device == "cpu" and dtype == torch.float32 else {}
    with torch.inference_mode():
        check({**modules, **exported}, images if exported else images[:2])  # exported for one size of batches
    for module in modules.values():
        module.to(device, dtype)
    with torch.inference_mode():
        times = measure({**modules, **exported}, images.to(device, dtype), device, options.repeats)
        peak = matrix_peak(device, dtype) if device != "cpu" else None
    print(machine())
    print(f"{options.arch}, 224 x 224, {options.dtype}, batches of {options.batch} on {device}")
    print_ratios(times, ours="vitembed", per=options.batch, unit="images/s")
    if peak is not None:
        print_shares(times, flops=options.batch * forward_flops(ViTConfig.named(options.arch)), peak=peak)


if __name__ == "__main__":
    main()
