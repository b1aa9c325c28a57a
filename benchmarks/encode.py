"""How fast the core of `encode` is: forward passes for the CLS embedding, beside five other ways of running them.

timm, torchvision and transformers in PyTorch; onnxruntime and OpenVINO on a processor, from timm's network exported to
ONNX, with as many threads as PyTorch and float32 asked for (on some processors OpenVINO would take bfloat16).

    python benchmarks/encode.py                      # S/16, 224 x 224, float32, batches of 16, on the processor
    python benchmarks/encode.py --arch B/16 --batch 8
    python benchmarks/encode.py --device cuda --dtype bfloat16 --batch 512

Tensors are in memory already. All libraries have the same weights, as a check of their outputs proves, and take turns
within one process; a figure is the ratio of medians. About four minutes. Without onnxruntime or OpenVINO
(`pip install onnxruntime openvino`) the script says so and goes on.
"""

import argparse
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import timm
import torch
import torchvision
import transformers
from timing import alternate, machine, print_ratios
from torch import Tensor

from vitembed.vit import ViT

TIMM = {"Ti/16": "tiny_patch16", "S/16": "small_patch16", "B/16": "base_patch16", "B/32": "base_patch32"}


def from_timm(ours: ViT, name: str) -> Callable[[Tensor], Tensor]:
    """Return timm's forward pass for the CLS token."""
    model = timm.create_model(f"vit_{TIMM[name]}_224", num_classes=0)
    model.load_state_dict(ours.state_dict())
    return model.eval()


def to_onnx(network: torch.nn.Module, images: Tensor, path: Path) -> None:
    """Write a network for batches of the images' size."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the older exporter, which needs nothing but PyTorch
        torch.onnx.export(network, (images,), path, input_names=["images"], output_names=["cls"], dynamo=False)


def from_onnxruntime(path: Path, threads: int) -> Callable[[Tensor], Tensor] | None:
    """Return onnxruntime's forward pass."""
    try:
        import onnxruntime
    except ImportError:
        return None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def from_openvino(path: Path, threads: int) -> Callable[[Tensor], Tensor] | None:
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


def from_torchvision(ours: ViT) -> Callable[[Tensor], Tensor]:
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
    model.heads = torch.nn.Identity()
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


def from_transformers(ours: ViT) -> Callable[[Tensor], Tensor]:
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
    model.eval()
    return lambda images: model(pixel_values=images).last_hidden_state[:, 0]


def copy_by_order(ours: ViT, model: torch.nn.Module) -> None:
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


def main() -> None:
    """Check that all libraries give the same embeddings, time them in turn, and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="S/16", choices=sorted(TIMM))
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    options = parser.parse_args()

    torch.manual_seed(0)
    ours = ViT.from_config(options.arch).eval()
    networks: dict[str, Callable[[Tensor], Tensor]] = {
        "vitembed": lambda images: ours(images).cls,
        "timm": from_timm(ours, options.arch),
        "torchvision": from_torchvision(ours),
        "transformers": from_transformers(ours),
    }
    images = torch.randn(options.batch, 3, 224, 224)
    if options.device == "cpu":
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "vit.onnx"
            to_onnx(networks["timm"], images, file)
            for name, build in {"onnxruntime": from_onnxruntime, "openvino": from_openvino}.items():
                if (network := build(file, torch.get_num_threads())) is not None:
                    networks[name] = network
                else:
                    print(f"{name} is not installed and left out")
    with torch.inference_mode():
        expected = networks["timm"](images)
        for name, network in networks.items():
            difference = (network(images) - expected).abs().max().item()
            assert difference < 1e-4, f"{name} computes something else: {difference}"
        dtype = getattr(torch, options.dtype)
        ours.to(options.device, dtype)
        for network in networks.values():
            if isinstance(network, torch.nn.Module):
                network.to(options.device, dtype)
        images = images.to(options.device, dtype)

        def timed(network: Callable[[Tensor], Tensor]) -> Callable[[], None]:
            def run() -> None:
                network(images)
                if options.device != "cpu":
                    torch.cuda.synchronize()

            return run

        times = alternate({name: timed(network) for name, network in networks.items()}, repeats=options.repeats)
    print(machine())
    print(f"{options.arch}, 224 x 224, {options.dtype}, batches of {options.batch} on {options.device}")
    print_ratios(times, ours="vitembed", per=options.batch, unit="images/s")


if __name__ == "__main__":
    main()
