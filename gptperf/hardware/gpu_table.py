"""The GPU table: peak by dtype, memory, bandwidth, and the document that each figure is from.

Data sheets of Ampere and later print the 2:4-sparse figure in large type; dense, what training computes, is half of it.
Peaks are those with float32 accumulation, which on GeForce cards is half the rate of the figure that is advertised.
float32 is the plain one without TF32, because gptperf computes float32 as float32. What no document says is left out.
"""

from dataclasses import dataclass

__all__ = ["DOCUMENTS", "GPUS", "Gpu"]

_V100, _A100 = "V100 data sheet", "A100 data sheet"
_HOPPER, _H100, _H100_NVL = "H100 architecture white paper", "H100 data sheet", "H100 NVL data sheet"
_H200, _GH200 = "H200 data sheet", "GH200 data sheet"
_HGX, _GB200, _GB300 = "HGX specifications", "GB200 NVL72 specifications", "GB300 NVL72 specifications"
_BLACKWELL, _BLACKWELL_ULTRA = "Blackwell data sheet", "Blackwell Ultra data sheet"
_L40S, _L4, _ADA = "L40S data sheet", "L4 data sheet", "Ada architecture white paper"
_RTX, _RTX_PRO = "RTX Blackwell architecture white paper", "RTX PRO Blackwell architecture white paper"

_NVIDIA, _IMAGES = "https://www.nvidia.com/", "https://images.nvidia.com/"
_PAGES, _DAM = _NVIDIA + "en-us/data-center/", _NVIDIA + "content/dam/en-zz/Solutions/"
DOCUMENTS: dict[str, str] = {
    _V100: _IMAGES + "content/technologies/volta/pdf/volta-v100-datasheet-update-us-1165301-r5.pdf",
    _A100: _DAM + "Data-Center/a100/pdf/nvidia-a100-datasheet-nvidia-us-2188504-web.pdf",
    _HOPPER: "https://resources.nvidia.com/en-us-tensor-core/gtc22-whitepaper-hopper",
    _H100: _PAGES + "h100/",
    _H100_NVL: _PAGES + "h100/",
    _H200: _PAGES + "h200/",
    _GH200: _PAGES + "grace-hopper-superchip/",
    _HGX: _PAGES + "hgx/",
    _GB200: _PAGES + "gb200-nvl72/",
    _GB300: _PAGES + "gb300-nvl72/",
    _BLACKWELL: "https://resources.nvidia.com/en-us-blackwell-architecture/datasheet",
    _BLACKWELL_ULTRA: "https://resources.nvidia.com/en-us-blackwell-architecture/blackwell-ultra-datasheet",
    _L40S: _PAGES + "l40s/",
    _L4: _PAGES + "l4/",
    _ADA: _IMAGES + "aem-dam/Solutions/geforce/ada/nvidia-ada-gpu-architecture.pdf",
    _RTX: _IMAGES + "aem-dam/Solutions/geforce/blackwell/nvidia-rtx-blackwell-gpu-architecture.pdf",
    _RTX_PRO: _DAM
    + "design-visualization/quadro-product-literature/NVIDIA-RTX-Blackwell-PRO-GPU-Architecture-v1.0.pdf",
}
"""Title of every source, all by NVIDIA, and where it is."""
_HALF = "half of sparse"


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One row of the table; rates in TFLOP/s (1e12) as printed in their source."""

    name: str
    cuda_names: tuple[str, ...]
    """Names that CUDA gives the card, without the brand; all words have to agree."""
    capability: tuple[int, int]
    dense_tflops: dict[str, float]
    """By dtype: bfloat16, float16 (both with float32 accumulation), float32, tf32, fp8."""
    sparse_tflops: dict[str, float]
    memory_gb: float
    """As the data sheet prints it: of HBM and GDDR alike, GiB less what ECC or the driver takes."""
    hbm_byte_s: float
    sources: dict[str, str]
    """Of dense, sparse, memory, bandwidth: a title in `DOCUMENTS`, or "half of sparse" where only that is printed."""

    @property
    def source(self) -> str:
        """The sources in one line; figures that are not from the first one are named."""
        documents = list(self.sources.values())
        most = max(documents, key=documents.count)
        others = [f"; {figure}: {document}" for figure, document in self.sources.items() if document != most]
        return f"NVIDIA {most}{''.join(others)}"


def _tensor(bf16: float | None, fp16: float, tf32: float | None = None, fp8: float | None = None) -> dict[str, float]:
    rates = {"bfloat16": bf16, "float16": fp16, "tf32": tf32, "fp8": fp8}
    return {dtype: rate for dtype, rate in rates.items() if rate is not None}


def _sources(document: str, *, dense: str = "", bandwidth: str = "", memory: str = "") -> dict[str, str]:
    """`document` for every figure that has no other."""
    return {
        "dense": dense or document,
        "sparse": document,
        "memory": memory or document,
        "bandwidth": bandwidth or document,
    }


def _v100(form: str, memory_gb: float, fp16: float, fp32: float) -> Gpu:
    """No bfloat16, no TF32, no sparsity on Volta."""
    sources = _sources(_V100)
    del sources["sparse"]
    return Gpu(
        name=f"V100 {form} {memory_gb:.0f} GB",
        cuda_names=(f"V100-{form.upper()}-{memory_gb:.0f}GB",),
        capability=(7, 0),
        dense_tflops={"float16": fp16, "float32": fp32},
        sparse_tflops={},
        memory_gb=memory_gb,
        hbm_byte_s=900e9,
        sources=sources,
    )


def _a100(form: str, cuda_names: tuple[str, ...], memory_gb: float, hbm_byte_s: float) -> Gpu:
    return Gpu(
        name=f"A100 {form} {memory_gb:.0f} GB",
        cuda_names=cuda_names,
        capability=(8, 0),
        dense_tflops=_tensor(312, 312, 156) | {"float32": 19.5},
        sparse_tflops=_tensor(624, 624, 312),
        memory_gb=memory_gb,
        hbm_byte_s=hbm_byte_s,
        sources=_sources(_A100),
    )


def _gh100(name: str, cuda_names: tuple[str, ...], memory_gb: float, hbm_byte_s: float, document: str) -> Gpu:
    """A full-clock Hopper module: 132 SMs. H100, H200 and GH200 differ in memory alone."""
    return Gpu(
        name=name,
        cuda_names=cuda_names,
        capability=(9, 0),
        dense_tflops=_tensor(989.4, 989.4, 494.7, 1978.9) | {"float32": 66.9},
        sparse_tflops=_tensor(1979, 1979, 989.4, 3958),
        memory_gb=memory_gb,
        hbm_byte_s=hbm_byte_s,
        sources=_sources(document, dense=_HOPPER),
    )


def _nvl(name: str, memory_gb: float, hbm_byte_s: float, document: str) -> Gpu:
    """A Hopper card of the NVL kind. The first H100 NVL data sheet printed the sum of two cards at full clocks."""
    return Gpu(
        name=name,
        cuda_names=(name,),
        capability=(9, 0),
        dense_tflops=_tensor(835, 835, 417.5, 1671) | {"float32": 60},
        sparse_tflops=_tensor(1671, 1671, 835, 3341),
        memory_gb=memory_gb,
        hbm_byte_s=hbm_byte_s,
        sources=_sources(document, dense=_HALF),
    )


def _hgx_blackwell(name: str, cuda_names: tuple[str, ...], capability: tuple[int, int], memory_gb: float) -> Gpu:
    """B200 or B300. Their data sheets cut TF32 to 2.2 PFLOPS; the HGX table has 18 PFLOPS for eight, 2.25 each."""
    document = _BLACKWELL if name == "B200" else _BLACKWELL_ULTRA
    return Gpu(
        name=name,
        cuda_names=cuda_names,
        capability=capability,
        dense_tflops=_tensor(2250, 2250, 1125, 4500) | {"float32": 75},
        sparse_tflops=_tensor(4500, 4500, 2250, 9000),
        memory_gb=memory_gb,
        hbm_byte_s=7.7e12,
        sources={
            "dense": _HALF,
            "sparse": _HGX,
            "memory": document,
            "bandwidth": document,
        },
    )


def _superchip(name: str, capability: tuple[int, int], memory_gb: float, document: str) -> Gpu:
    """One of the two Blackwell GPUs beside a Grace CPU; their power limit is higher than HGX's."""
    return Gpu(
        name=name,
        cuda_names=(name,),
        capability=capability,
        dense_tflops=_tensor(2500, 2500, 1250, 5000) | {"float32": 80},
        sparse_tflops=_tensor(5000, 5000, 2500, 10000),
        memory_gb=memory_gb,
        hbm_byte_s=8e12,
        sources=_sources(document, dense=_HALF),
    )


_VOLTA_AMPERE = (
    _v100("SXM2", 16, 125, 15.7),
    _v100("SXM2", 32, 125, 15.7),
    _v100("PCIe", 16, 112, 14),
    _v100("PCIe", 32, 112, 14),
    _a100("SXM", ("A100-SXM4-40GB",), 40, 1555e9),
    _a100("SXM", ("A100-SXM4-80GB", "A100-SXM-80GB"), 80, 2039e9),
    _a100("PCIe", ("A100-PCIE-40GB",), 40, 1555e9),
    _a100("PCIe", ("A100 80GB PCIe", "A100-PCIE-80GB"), 80, 1935e9),
)
_HOPPERS = (
    _gh100("H100", ("H100 80GB HBM3", "H100 SXM5 80GB"), 80, 3350e9, _H100),
    Gpu(
        name="H100 PCIe",
        cuda_names=("H100 PCIe",),
        capability=(9, 0),
        dense_tflops=_tensor(756, 756, 378, 1513) | {"float32": 51.2},
        sparse_tflops=_tensor(1513, 1513, 756, 3026),
        memory_gb=80,
        hbm_byte_s=2000e9,
        sources=_sources(_H100, dense=_HOPPER),
    ),
    _nvl("H100 NVL", 94, 3900e9, _H100_NVL),
    _gh100("H200", ("H200",), 141, 4800e9, _H200),
    _nvl("H200 NVL", 141, 4800e9, _H200),
    # The size in the first two CUDA names is the Grace CPU's memory.
    _gh100("GH200 96 GB", ("GH200 480GB", "GH200 120GB"), 96, 4000e9, _GH200),
    _gh100("GH200 144 GB", ("GH200 144G HBM3e",), 144, 4900e9, _GH200),
)
_BLACKWELLS = (
    # Early tables give the B200 192 GB and 8 TB/s; the bus that its driver reports is 7,680 bits, which is 7.7 TB/s.
    _hgx_blackwell("B200", ("B200",), (10, 0), 180),
    _superchip("GB200", (10, 0), 186, _GB200),
    _hgx_blackwell("B300", ("B300 SXM6 AC", "B300"), (10, 3), 270),
    _superchip("GB300", (10, 3), 279, _GB300),
)
_ADA_AND_RTX = (
    Gpu(
        name="L40S",
        cuda_names=("L40S",),
        capability=(8, 9),
        # 362.05 as printed, beside a sparse 733 and an FP8 of 733.
        dense_tflops=_tensor(362.05, 362.05, 183, 733) | {"float32": 91.6},
        sparse_tflops=_tensor(733, 733, 366, 1466),
        memory_gb=48,
        hbm_byte_s=864e9,
        sources=_sources(_L40S),
    ),
    Gpu(
        name="L4",
        cuda_names=("L4",),
        capability=(8, 9),
        dense_tflops=_tensor(121, 121, 60, 242.5) | {"float32": 30.3},
        sparse_tflops=_tensor(242, 242, 120, 485),
        memory_gb=24,
        hbm_byte_s=300e9,
        sources=_sources(_L4, dense=_HALF),
    ),
    Gpu(
        name="RTX 4090",
        cuda_names=("RTX 4090",),
        capability=(8, 9),
        dense_tflops=_tensor(165.2, 165.2, 82.6, 330.3) | {"float32": 82.6},
        sparse_tflops=_tensor(330.4, 330.4, 165.2, 660.6),
        memory_gb=24,
        hbm_byte_s=1008e9,
        sources=_sources(_ADA),
    ),
    Gpu(
        name="RTX 6000 Ada",
        cuda_names=("RTX 6000 Ada Generation",),
        capability=(8, 9),
        dense_tflops=_tensor(364.2, 364.2, 182.1, 728.5) | {"float32": 91.1},
        sparse_tflops=_tensor(728.5, 728.5, 364.2, 1457),
        memory_gb=48,
        hbm_byte_s=960e9,
        sources=_sources(_RTX_PRO),
    ),
    Gpu(
        name="RTX 5090",
        cuda_names=("RTX 5090",),
        capability=(12, 0),
        dense_tflops=_tensor(209.5, 209.5, 104.8, 419) | {"float32": 104.8},
        sparse_tflops=_tensor(419, 419, 209.5, 838),
        memory_gb=32,
        hbm_byte_s=1792e9,
        sources=_sources(_RTX),
    ),
)

GPUS: tuple[Gpu, ...] = _VOLTA_AMPERE + _HOPPERS + _BLACKWELLS + _ADA_AND_RTX
"""The table."""
