# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""What a training step costs, counted from the config, and what it could take on GPUs that nobody has at hand.

    python benchmarks/roofline.py                              # SiT-XL/2 at 256 px; some minutes
    python benchmarks/roofline.py --preset SiT-S/8 --batch_sizes 8

A step is run on tensors without values (`simulated_cuda.py`), and every kernel that it would start is counted: its
products (FLOP) and what it reads and writes (bytes). A kernel takes the longer of both times. The kernels of compiled
blocks are those of the compiler's own scheduler (inductor's, of torch 2.15 with Triton). **These are counts and not
measurements**; what they assume is in the results.

The utilisation is the work that the method needs (forward and backward, once, the probe's stream on the samples whose
labels differ) over the time and the peak.
"""

import argparse
import json
import operator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from simulated_cuda import simulated_cuda
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from diffusers_lsep import SIT_PRESETS, LinearProbe, LSEPObjective, SiTTransformer2DModel
from diffusers_lsep.attention_processors import SiTConcatenatedAttnProcessor
from diffusers_lsep.training.memory import FusedAttention, autocast, trace_block, without_values


SHARED = 0.18  # of the samples have the same label in both streams
CLASSES = 1000


@dataclass(frozen=True)
class Device:
    """Dense bfloat16, of the data sheet, and the parts of it that kernels reach: assumptions."""

    teraflops: float
    terabytes_per_second: float
    products: float = 0.75  # of the peak, in large matrix products
    attention: float = 0.35  # of the peak, by FlashAttention 2
    cudnn_attention: float = 0.35
    memory: float = 0.85  # of the bandwidth
    launch_microseconds: float = 4.0  # between kernels that are not compiled together


DEVICES = {
    "A100": Device(312, 2.04, attention=0.5, cudnn_attention=0.5),
    "H100": Device(989, 3.35, products=0.7, cudnn_attention=0.55),
    "H200": Device(989, 4.8, products=0.7, cudnn_attention=0.55),
}
ASSUMPTIONS = (
    "The parts of the peak that kernels reach are assumed, not measured; heads of 72 are as fast as such of 64.",
    "A kernel takes the longer of its products' and its bytes' time; nothing overlaps, nothing stays in a cache.",
    "Compiled are the blocks; the rest of the network is not counted there.",
    "The loader, communication between GPUs, and checkpoints are left out.",
)


@dataclass
class Kernel:
    kind: str  # "product", "attention" or "other"
    flops: float
    bytes: float


class Kernels(TorchDispatchMode):
    """Lists the kernels that are started: all operations but views."""

    def __init__(self):
        super().__init__()
        self.found: list[Kernel] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        output = function(*args, **kwargs)
        if not is_view(function) and function.namespace == "aten":
            read, written = moved(function, args, kwargs, output)
            if read + written:
                self.found.append(Kernel(*work(function, args, kwargs, output), read + written))
        return output


def is_view(function: Any) -> bool:
    aliases = [value.alias_info for value in function._schema.returns]
    return any(alias is not None and not alias.is_write for alias in aliases)


def moved(function: Any, args: tuple, kwargs: dict, output: Any) -> tuple[int, int]:
    """Bytes that an operation reads and writes."""
    read = written = 0
    for index, argument in enumerate(function._schema.arguments):
        value = args[index] if index < len(args) else kwargs.get(argument.name)
        size = sum(size_of(tensor) for tensor in tree_leaves(value))
        changes = argument.alias_info is not None and argument.alias_info.is_write
        written += size if changes else 0
        read += 0 if changes and str(function).startswith(("aten.copy_", "aten.fill_", "aten.zero_")) else size
    if not any(value.alias_info is not None for value in function._schema.returns):
        written += sum(size_of(tensor) for tensor in tree_leaves(output))
    return read, written


def size_of(value: Any) -> int:
    """Bytes of a tensor; what is expanded is read once."""
    if not isinstance(value, torch.Tensor):
        return 0
    elements = 1
    for size, stride in zip(value.shape, value.stride()):
        elements *= size if stride or size == 1 else 1
    return elements * value.element_size()


def work(function: Any, args: tuple, kwargs: dict, output: Any) -> tuple[str, float]:
    """
    Kind and FLOP of an operation. Attention's are the two products of its forward and the four of its backward pass;
    the kernel computes a fifth anew.
    """
    packet = function.overloadpacket
    if "attention" in str(packet):
        is_backward = "backward" in str(packet)
        batch, heads, tokens, width = args[1 if is_backward else 0].shape
        return "attention", (8.0 if is_backward else 4.0) * batch * heads * tokens**2 * width
    if packet not in flop_registry:
        return "other", 0.0
    return "product", float(flop_registry[packet](*args, **kwargs, out_val=output))


@dataclass(frozen=True)
class Shape:
    """A model and a batch."""

    config: dict[str, int]
    sample_size: int
    batch_size: int
    probe_depth: int
    classes: int = CLASSES

    @property
    def separate(self) -> int:
        return round((1 - SHARED) * self.batch_size)

    def objective(self, concatenates: bool = False) -> LSEPObjective:
        sizes = {"sample_size": self.sample_size, "num_classes": self.classes}
        transformer = SiTTransformer2DModel(**self.config, **sizes).train()
        if concatenates:
            transformer.set_attn_processor(SiTConcatenatedAttnProcessor())
        return LSEPObjective(
            transformer, LinearProbe(transformer.inner_dim, self.classes), probe_depth=self.probe_depth
        )

    def batch(self, device: str) -> dict[str, torch.Tensor]:
        latents = torch.zeros(self.batch_size, 4, self.sample_size, self.sample_size, device=device)
        row = torch.zeros(self.batch_size, device=device)
        batch = {"latents": latents, "class_labels": row.long(), "noise": latents, "timesteps": row}
        batch |= {f"{name}_dropout_mask": row.bool() for name in ("class", "probe")}
        return batch | {"separate_rows": torch.arange(self.separate, device=device)}


def formula_flops(shape: Shape) -> float:
    """FLOP of the products of a step, forward and backward, in closed form."""
    heads, width_of_head = shape.config["num_attention_heads"], shape.config["attention_head_dim"]
    width, patch = heads * width_of_head, shape.config["patch_size"] ** 2 * 4
    tokens = (shape.sample_size // shape.config["patch_size"]) ** 2
    # Of a row, forward: q, k, v and output 8 D^2, MLP 16 D^2 of a token; attention; the modulation
    block = tokens * 24 * width**2 + 4 * tokens**2 * width + 12 * width**2
    depth, layers = shape.probe_depth, shape.config["num_layers"]
    rows, both = shape.batch_size, shape.batch_size + shape.separate
    forward = block * (rows * layers + shape.separate * depth)
    forward += both * 2 * width**2  # the second layer of the time's embedding
    forward += rows * (4 * width**2 + 2 * tokens * patch * width + 2 * width * shape.classes)  # output, and the probe
    # These two need no gradient of their input.
    first = rows * 2 * tokens * patch * width + both * 2 * 256 * width
    return 3 * forward + 2 * first


def count_flops(shape: Shape) -> float:
    """The same, counted: every product of the plain formula of attention, on no device."""
    with torch.device("meta"):
        objective = shape.objective()
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH):
        objective(**shape.batch("meta")).loss.backward()
    return float(counter.get_total_flops())


def eager_kernels(shape: Shape, concatenates: bool = False) -> dict[str, list[Kernel]]:
    """The kernels of the parts of a step in bfloat16 autocast, each operation on its own."""
    with simulated_cuda(), torch.device("cuda"):
        objective, batch = shape.objective(concatenates), shape.batch("cuda")
        with Kernels() as model:
            with autocast("cuda", torch.bfloat16), FusedAttention():
                loss = objective(**batch).loss
            loss.backward()
    parameters = sum(parameter.numel() for parameter in objective.parameters())
    # Clipping reads the gradients, and reads and writes them; AdamW reads four tensors and writes three; the average
    # reads two and writes one.
    update = [Kernel("other", 0.0, 4.0 * count * parameters) for count in (1, 2, 7, 3)]
    return {"model": model.found, "update": update}


def compiled_kernels(shape: Shape, concatenates: bool = False) -> list[Kernel]:
    """Those of the blocks' forward and backward pass."""
    found: list[Kernel] = []
    with without_values("cpu"), autocast("cpu", torch.bfloat16), FusedAttention():
        transformer = shape.objective(concatenates).transformer
        block, width = transformer.transformer_blocks[0], transformer.inner_dim
        # Not in `autocast`'s dtype where the model keeps what it adds up in float32
        dtype = transformer.embed_patches(shape.batch("cpu")["latents"]).dtype
        tokens = (shape.sample_size // shape.config["patch_size"]) ** 2
        rows = {shape.batch_size: shape.config["num_layers"] - shape.probe_depth}
        rows[shape.batch_size + shape.separate] = shape.probe_depth
        for count, blocks in rows.items():
            inputs = torch.zeros(count, tokens, width, dtype=dtype), torch.zeros(count, width, dtype=dtype)
            found += [kernel for graph in trace_block(block, *inputs) for kernel in schedule(graph)] * blocks
    return found


def schedule(graph: torch.fx.GraphModule) -> list[Kernel]:
    """
    The kernels that PyTorch's compiler would make of a graph for an H100, which need not be there: its scheduler is
    asked, and nothing is compiled. The graph was traced on the CPU, whose name attention keeps.
    """
    from torch._inductor.debug import DebugContext
    from torch._inductor.graph import GraphLowering
    from torch._inductor.runtime.hints import DeviceProperties
    from torch._inductor.virtualized import V

    h100 = DeviceProperties("cuda", 0, 132, 90, 9, 65536, 2048, 1024, 32)
    mode, device = FakeTensorMode(), torch.device("cuda", 0)
    for node in graph.graph.nodes:
        if node.kwargs.get("device") is not None:
            node.update_kwarg("device", device)
    values = [node.meta["val"] for node in graph.graph.find_nodes(op="placeholder")]
    with mode:
        inputs = [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device) for x in values]
    FakeTensorProp(graph, mode).propagate_dont_convert_inputs(*inputs)
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(DeviceProperties, "create", lambda device: h100))
        stack.enter_context(mock.patch("torch._inductor.scheduler.has_triton", return_value=True))
        stack.enter_context(V.set_fake_mode(mode))
        stack.enter_context(V.set_debug_handler(DebugContext()))
        lowered = GraphLowering(graph, example_inputs=inputs, shape_env=ShapeEnv())
        stack.enter_context(V.set_graph_handler(lowered))
        lowered.run(*inputs)
        lowered.init_wrapper_code()
        lowered._update_scheduler()
        scheduled = [(node, node.get_read_write_buffers_sizes()) for node in lowered.scheduler.nodes]
    kernels = []
    for node, size in scheduled:
        if size:  # else it is only a part of what another one gives
            operations = node.node.get_origins() if node.is_extern() else ()
            works = [work(x.target, *known_arguments(x)) for x in operations if x.op == "call_function"]
            kind, flops = max(works, key=operator.itemgetter(1), default=("other", 0.0))
            kernels.append(Kernel(kind, flops, float(size)))
    return kernels


def known_arguments(node: torch.fx.Node) -> tuple[tuple, dict, Any]:
    """Arguments and output of a node of a graph."""
    args, kwargs = tree_map_only(torch.fx.Node, lambda x: x.meta["val"], (node.args, node.kwargs))
    return args, kwargs, node.meta["val"]


def seconds(kernels: list[Kernel], device: Device, cudnn: bool, launches: bool) -> float:
    reached = {"product": device.products, "attention": device.cudnn_attention if cudnn else device.attention}
    total = 0.0
    for kernel in kernels:
        computing = kernel.flops / (1e12 * device.teraflops * reached.get(kernel.kind, 1.0))
        moving = kernel.bytes / (1e12 * device.terabytes_per_second * device.memory)
        total += max(computing, moving, 1e-6 * device.launch_microseconds if launches else 0.0)
    return total


def measure(shape: Shape) -> dict[str, Any]:
    """Counts and utilisations of a shape."""
    needed = formula_flops(shape)
    eager = eager_kernels(shape)
    ways: dict[str, tuple[list[Kernel], bool, bool]] = {"eager": (eager["model"], False, True)}
    in_blocks = {name: compiled_kernels(shape, joined) for name, joined in (("compiled", False), ("joined", True))}
    ways["compiled"] = (in_blocks["compiled"], False, False)
    ways["compiled, cuDNN attention"] = (in_blocks["compiled"], True, False)
    ways["compiled, cuDNN attention, one product for q, k, v"] = (in_blocks["joined"], True, False)
    rows = []
    for way, (kernels, cudnn, launches) in ways.items():
        row: dict[str, Any] = {"way": way, "kernels": len(kernels), "gigabytes": sum(k.bytes for k in kernels) / 1e9}
        row["products"] = sum(kernel.kind == "product" for kernel in kernels)
        for name, device in DEVICES.items():
            time = seconds(kernels, device, cudnn, launches) + seconds(eager["update"], device, cudnn, launches)
            row[name] = needed / (time * 1e12 * device.teraflops)
        rows.append(row)
    return {
        "batch_size": shape.batch_size,
        "gflop_per_image": needed / shape.batch_size / 1e9,
        "gigabytes_of_update": sum(kernel.bytes for kernel in eager["update"]) / 1e9,
        "ways": rows,
    }


def format_markdown(results: dict[str, Any]) -> str:
    lines = [f"{results['preset']}, latents 4 x {results['sample_size']} x {results['sample_size']}, counted:", ""]
    lines += [f"| batch | | kernels | products | GB | {' | '.join(DEVICES)} |", "|---" * (5 + len(DEVICES)) + "|"]
    for found in results["shapes"]:
        for row in found["ways"]:
            shares = " | ".join(f"{row[name]:.0%}" for name in DEVICES)
            counts = f"{row['kernels']:,} | {row['products']} | {row['gigabytes']:.1f}"
            lines.append(f"| {found['batch_size']} | {row['way']} | {counts} | {shares} |")
    return "\n".join([*lines, "", *(f"- {text}" for text in results["assumptions"]), ""])


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=list(SIT_PRESETS), default="SiT-XL/2")
    parser.add_argument("--sample_size", type=int, default=32, help="Side of the latents: 64 for 512 px.")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[32, 256])
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/roofline.json"))
    args = parser.parse_args(argv)
    config = SIT_PRESETS[args.preset]
    results: dict[str, Any] = {"preset": args.preset, "sample_size": args.sample_size, "assumptions": ASSUMPTIONS}
    results |= {"devices": {name: asdict(device) for name, device in DEVICES.items()}, "shapes": []}
    for batch_size in args.batch_sizes:
        depth = min(8, config["num_layers"] // 3)
        results["shapes"].append(measure(Shape(config, args.sample_size, batch_size, depth)))
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(results, indent=2) + "\n")
    text = format_markdown(results)
    args.output.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
