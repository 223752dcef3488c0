"""Hardware as data: peaks, memory and links from data sheets, and the shares of them that programs reach.

The shares are one set of constants per kind of hardware, the same for every model and plan. `fitted` says on what.
"""

import dataclasses
from typing import Annotated

from orogen.config.checks import ConfigError
from orogen.config.cluster import ClusterConfig

GIB = 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shares:
    """What a kind of hardware reaches of its peaks. Times are in seconds."""

    matmul: Annotated[float, "share of the peak that large products of matrices reach"] = 0.80
    matmul_fp8: Annotated[float, "the same, of the FP8 peak, for products of operands in 8 bits"] = 0.67
    depth: Annotated[float, "contracted size at which a product reaches half of that share"] = 120.0
    grouped: Annotated[float, "share of the peak that large grouped products of experts reach"] = 0.77
    padding: Annotated[float, "rows that each expert's products cost beside its own, in padding and changes"] = 128.0
    attention_forward: Annotated[float, "share of the peak, fused attention of long sequences, forward pass"] = 0.67
    attention_backward: Annotated[
        float, "share of the peak, fused attention of long sequences, backward pass of five products"
    ] = 0.54
    attention_length: Annotated[float, "length at which fused attention reaches half of those shares"] = 1000.0
    scores: Annotated[float, "share of the peak, products of attention that writes its scores"] = 0.35
    ssd_forward: Annotated[float, "share of the memory bandwidth, SSD and scans, forward pass"] = 0.60
    ssd_backward: Annotated[float, "share of the memory bandwidth, SSD and scans, backward pass"] = 0.47
    memory: Annotated[float, "share of the memory bandwidth, elementwise kernels"] = 0.80
    launch: Annotated[float, "seconds that a kernel takes beside its work"] = 4e-6
    cast_bytes: Annotated[float, "bytes that a kernel moves that casts one number to 8 bits"] = 6.0
    host: Annotated[float, "seconds that the host of an eager program takes to launch a kernel"] = 55e-6
    decode_launch: Annotated[float, "the same in a decoding step, all of whose kernels one program launches"] = 2e-6
    decode_experts: Annotated[float, "share of the memory bandwidth at which a decoding step reads experts"] = 0.63
    decode_8_bits: Annotated[float, "the same, of weights in 8 bits, of experts and others"] = 0.32
    node: Annotated[float, "share of the node's links that large collectives reach"] = 0.80
    node_few: Annotated[float, "loss of that share with two devices, relative; with n devices 2/n of it"] = 0.28
    network: Annotated[float, "share of the network between nodes that large exchanges reach"] = 0.90
    gathers: Annotated[
        float, "time of gathers and sums of parameters that are sharded layer by layer, over exchanges of as many bytes"
    ] = 1.32
    node_latency: Annotated[float, "seconds before the first byte, within a node"] = 6e-6
    network_latency: Annotated[float, "seconds before the first byte, between nodes"] = 20e-6
    congestion: Annotated[float, "loss of the network's share per doubling of the nodes in a group, relative"] = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hardware:
    """One kind of device and the node that it comes in.

    peak_flops: dense products, FLOP/s, by format. memory_bytes: what programs can use. bandwidth: of the device's
    memory, bytes/s. node_bandwidth, network_bandwidth: bytes/s that one device sends in one direction, within its node
    and between nodes. cores: multiprocessors, over which tiles of (rows, columns) of a product are spread.
    host_bandwidth: bytes/s between the device and its host. watts: of a device with its share of the host.
    """

    name: str
    title: str
    peak_flops: dict[str, float]
    memory_bytes: float
    bandwidth: float
    node_size: int
    node_bandwidth: float
    network_bandwidth: float
    host_bandwidth: float
    cores: int
    tile: tuple[int, int]
    watts: float
    source: str
    fitted: str
    shares: Shares = Shares()

    @property
    def peak(self) -> float:
        """The peak of bfloat16 products, by which utilisation is measured."""
        return self.peak_flops["bfloat16"]


HOPPER = {
    "peak_flops": {"bfloat16": 989.4e12, "float32": 494.7e12, "fp8": 1978.9e12},
    "node_size": 8,
    "node_bandwidth": 450e9,
    "network_bandwidth": 50e9,
    "host_bandwidth": 55e9,
    "cores": 132,
    "tile": (128, 256),
}
HOPPER_FITTED = (
    "experiments/gpu_throughput, two_gpus and decode_throughput; NCCL 2.29 and GEMM tables of aiconfigurator "
    "(h100_sxm); the rows of experiments/published_tables/fitted.json"
)
# H200: the scans of an SSD are as fast as on an H100, where they wait and do not lack bandwidth
# (experiments/gpu_throughput), so their shares of its bandwidth are smaller. Products are slower than on an H100, for a
# reason not known: its runs on one GPU need 0.72 (experiments/predicted_and_measured).
H200_SHARES = Shares(matmul=0.72, grouped=0.73, ssd_forward=0.42, ssd_backward=0.33)
# cast_bytes: on Hopper an operand is read for its largest number, read again for the cast, and written in both layouts;
# MX blocks are cast as they are read. The scans of an SSD are taken to be as fast per multiprocessor as on an H100.
BLACKWELL = {
    "peak_flops": {"bfloat16": 2500e12, "float32": 1250e12, "fp8": 5000e12, "nvfp4": 10000e12},
    "bandwidth": 8.0e12,
    "node_size": 72,
    "node_bandwidth": 900e9,
    "host_bandwidth": 200e9,
    "cores": 148,
    "tile": (128, 256),
    "shares": Shares(
        node=0.62,
        node_few=0.0,
        matmul=0.74,
        matmul_fp8=0.53,
        grouped=0.71,
        memory=0.55,
        padding=256.0,
        cast_bytes=4.0,
        ssd_forward=0.28,
        ssd_backward=0.22,
    ),
}

KINDS = {
    kind.name: kind
    for kind in (
        Hardware(
            name="a100", title="NVIDIA A100 SXM 80 GB", peak_flops={"bfloat16": 312e12, "float32": 156e12},
            memory_bytes=79.1 * GIB, bandwidth=2.039e12, node_size=8, node_bandwidth=300e9, network_bandwidth=25e9,
            host_bandwidth=25e9, cores=108, tile=(128, 256), watts=812,
            source="NVIDIA A100 data sheet; DGX A100 with eight HDR 200 Gb/s adapters (arXiv:2104.04473, section 5)",
            fitted="the A100 rows of experiments/published_tables/fitted.json", shares=Shares(gathers=1.14),
        ),
        Hardware(
            name="h100", title="NVIDIA H100 SXM 80 GB", memory_bytes=79.1 * GIB, bandwidth=3.35e12, watts=1275,
            source="NVIDIA H100 data sheet; DGX H100 with eight 400 Gb/s adapters, 10.2 kW", fitted=HOPPER_FITTED,
            **HOPPER,
        ),
        Hardware(
            name="h200", title="NVIDIA H200 SXM 141 GB", memory_bytes=139.8 * GIB, bandwidth=4.8e12, watts=1275,
            source="NVIDIA H200 data sheet; DGX H200 with eight 400 Gb/s adapters",
            fitted="experiments/two_gpus and predicted_and_measured; the rest as h100", shares=H200_SHARES, **HOPPER,
        ),
        Hardware(
            name="gb200", title="NVIDIA GB200 NVL72", memory_bytes=184 * GIB, network_bandwidth=50e9, watts=1670,
            source="NVIDIA GB200 NVL72 data sheet: 186 GB, 2.5 PFLOP/s dense bfloat16; 400 Gb/s per GPU, 120 kW a rack",
            fitted="arXiv:2603.07685, table 7, and the Blackwell rows of experiments/published_tables/fitted.json",
            **BLACKWELL,
        ),
        Hardware(
            name="gb300", title="NVIDIA GB300 NVL72", memory_bytes=276 * GIB, network_bandwidth=100e9, watts=1830,
            source="NVIDIA GB300 NVL72 data sheet: 288 GB, 2.5 PFLOP/s dense bfloat16; 800 Gb/s per GPU, 132 kW a rack",
            fitted="as gb200", **BLACKWELL,
        ),
        Hardware(
            name="tpu_v5p", title="Google TPU v5p", peak_flops={"bfloat16": 459e12, "float32": 115e12},
            memory_bytes=95e9, bandwidth=2.765e12, node_size=8960, node_bandwidth=300e9, network_bandwidth=6.25e9,
            host_bandwidth=16e9, cores=1, tile=(128, 128), watts=600,
            source="cloud.google.com/tpu/docs/v5p: 459 TFLOP/s, 95 GB, 2,765 GB/s, six links of 100 GB/s (half of them "
            "in a ring's direction); the power is an assumption",
            fitted="nothing: shares of the H100", shares=Shares(node_few=0.0),
        ),
        Hardware(
            name="trillium", title="Google TPU v6e (Trillium)", peak_flops={"bfloat16": 918e12, "float32": 230e12},
            memory_bytes=32e9, bandwidth=1.64e12, node_size=256, node_bandwidth=200e9, network_bandwidth=12.5e9,
            host_bandwidth=16e9, cores=1, tile=(256, 256), watts=500,
            source="cloud.google.com/tpu/docs/v6e: 918 TFLOP/s, 32 GB, 1,640 GB/s, 800 GB/s of links (a quarter of "
            "them in a ring's direction); the power is an assumption",
            fitted="nothing: shares of the H100", shares=Shares(node_few=0.0),
        ),
        Hardware(
            name="cpu", title="two cores of a server CPU", peak_flops={"bfloat16": 0.15e12, "float32": 0.15e12},
            memory_bytes=16 * GIB, bandwidth=20e9, node_size=1024, node_bandwidth=5e9, network_bandwidth=1.25e9,
            host_bandwidth=20e9, cores=1, tile=(16, 16), watts=30,
            source="AVX-512 at 2.5 GHz, two fused multiply-adds per cycle; one channel of DDR4",
            fitted="nothing", shares=Shares(launch=2e-6, depth=16.0, grouped=0.3, padding=1.0),
        ),
    )
}  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Software:
    """What a program does with the hardware: what it hides, and what it waits for.

    overlap_X: the share of the traffic of kind X that is sent while something is computed. Kinds are `tensor`,
    `context`, `expert`, `data` (gradients and sharded parameters) and `stage`.
    """

    one_program: Annotated[float, "1 if all stages of a pipeline run one program over one table of ticks, else 0"] = 0.0
    tick_seconds: Annotated[float, "seconds that a tick of such a program takes beside its passes"] = 0.0
    overlap_tensor: Annotated[float, "share of the traffic over tensor ranks that is hidden"] = 0.0
    overlap_context: Annotated[float, "share of the traffic over context ranks that is hidden"] = 0.7
    overlap_expert: Annotated[float, "share of the exchanges with experts that is hidden"] = 0.0
    overlap_data: Annotated[float, "share of gradients and sharded parameters that is hidden"] = 0.8
    overlap_stage: Annotated[float, "share of a pipeline's sends that is hidden"] = 0.0
    contention: Annotated[float, "slowdown of the compute beside which something is sent"] = 0.6
    contention_data: Annotated[float, "the same, of gradients and sharded parameters sent between nodes"] = 0.6
    step_seconds: Annotated[float, "seconds of a step in which a device waits for its host"] = 5e-3
    dynamic: Annotated[float, "1 if buffers of experts' rows have the size of what they hold, else 0"] = 0.0
    recompute_all: Annotated[float, "1 if a recomputed layer's last product is repeated, which no gradient needs"] = 0.0
    grouped_fp8: Annotated[float, "1 if FP8 applies to the experts' products too"] = 0.0
    once_per_node: Annotated[float, "1 if a token is sent once to each node that has some of its experts, else 0"] = 0.0
    sorts: Annotated[float, "passes that sort rows by expert after they are received, and back before they leave"] = 0.0
    regathers: Annotated[float, "1 if sharded parameters are gathered again for the backward pass, else 0"] = 0.0
    ssd_forward_time: Annotated[float, "time of the SSD's forward pass over that of this code's kernels"] = 1.0
    ssd_backward_time: Annotated[float, "the same, of its backward pass"] = 1.0
    casts: Annotated[float, "1 if operands are cast to 8 bits by kernels of their own, 0 if within others"] = 0.0
    eager: Annotated[float, "1 if a host launches every kernel, one after another, else 0"] = 0.0
    graph_attention: Annotated[float, "1 if the kernels of an attention layer's pass are launched as one, else 0"] = 0.0
    graph_mamba: Annotated[float, "the same, of a Mamba layer's"] = 0.0
    graph_router: Annotated[float, "the same, of routing, and of what experts share"] = 0.0


PROGRAMS = {
    # From traces of experiments/two_gpus: exposed over all communication, by plan.
    "orogen": Software(
        one_program=1.0,
        tick_seconds=1.5e-3,
        overlap_tensor=0.2,
        overlap_context=0.5,
        overlap_expert=0.6,
        overlap_data=0.85,
        contention=0.7,
    ),
    "megatron2021": Software(recompute_all=1.0),
    # The SSD: mamba_ssm's kernels beside ours (experiments/gpu_throughput). contention_data: few multiprocessors send
    # (arXiv:2603.07685).
    "megatron": Software(
        recompute_all=1.0,
        grouped_fp8=1.0,
        dynamic=1.0,
        overlap_context=0.95,
        overlap_tensor=0.6,
        contention=0.67,
        contention_data=0.2,
        ssd_forward_time=2.3,
        ssd_backward_time=2.6,
        casts=1.0,
        eager=1.0,
        regathers=1.0,
    ),
}


def machine(cluster: ClusterConfig) -> tuple[Hardware, Software]:
    """A cluster's hardware and program, its constants in place. Raises ConfigError on unknown ones."""
    hardware, software = KINDS[cluster.hardware], PROGRAMS[cluster.software]
    changed = {"node_size": cluster.node_size, "watts": cluster.watts}
    changed["memory_bytes"] = None if cluster.memory_gib is None else cluster.memory_gib * GIB
    shares, program = ({f.name for f in dataclasses.fields(kind)} for kind in (Shares, Software))
    values = dict(entry.split("=", 1) for entry in cluster.constants)
    if unknown := sorted(values.keys() - shares - program):
        expected = ", ".join(sorted(shares | program))
        raise ConfigError(f"ClusterConfig.constants has {unknown[0]!r}; expected names among {expected}")
    changed["shares"] = _with(hardware.shares, values, shares)
    hardware = dataclasses.replace(hardware, **{name: value for name, value in changed.items() if value is not None})
    return hardware, _with(software, values, program)


def _with(constants, values, names):
    return dataclasses.replace(constants, **{name: float(value) for name, value in values.items() if name in names})
