"""The GPU table: peak by dtype, memory, bandwidth, and the document that states each figure.

Data sheets of Ampere and later print the 2:4-sparse figure in large type; the dense one, for training, is half of it.
Peaks are those with float32 accumulation, which GeForce GPUs run at half the advertised rate. float32 peaks are without
TF32, because gptperf computes float32 as float32. Figures that no document states are left out: NVIDIA states neither
the bfloat16 rate of the GB10 nor the dense rates of the server edition of the RTX PRO 6000 Blackwell.
"""

from dataclasses import dataclass
from typing import NamedTuple

__all__ = ["DOCUMENTS", "GPUS", "Gpu"]

_V100, _A100 = "V100 data sheet", "A100 data sheet"
_HOPPER, _H100, _H100_NVL = "H100 architecture white paper", "H100 data sheet", "H100 NVL data sheet"
_H200, _GH200 = "H200 data sheet", "GH200 data sheet"
_HGX, _GB200, _GB300 = "HGX specifications", "GB200 NVL72 specifications", "GB300 NVL72 specifications"
_BLACKWELL, _BLACKWELL_ULTRA = "Blackwell data sheet", "Blackwell Ultra data sheet"
_L40S, _L4, _ADA = "L40S data sheet", "L4 data sheet", "Ada architecture white paper"
_RTX, _RTX_PRO = "RTX Blackwell architecture white paper", "RTX PRO Blackwell architecture white paper"
_T4, _A10, _A10G, _A30 = "T4 data sheet", "A10 data sheet", "A10G data sheet", "A30 data sheet"
_A40, _L40, _GA102 = "A40 data sheet", "L40 data sheet", "GA102 architecture white paper"
_CLUSTERS = "TensorRT-LLM cluster table"

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
    _T4: _PAGES + "tesla-t4/",
    _A10: _DAM + "Data-Center/a10/pdf/datasheet-new/nvidia-a10-datasheet.pdf",
    _A10G: "https://d1.awsstatic.com/product-marketing/ec2/NVIDIA_AWS_A10G_DataSheet_FINAL_02_17_2022.pdf",
    _A30: _DAM + "data-center/products/a30-gpu/pdf/a30-datasheet.pdf",
    _A40: "https://images.nvidia.cn/content/Solutions/data-center/a40/nvidia-a40-datasheet.pdf",
    _L40: "https://images.nvidia.cn/content/Solutions/data-center/vgpu-L40-datasheet.pdf",
    _GA102: _NVIDIA + "content/PDF/nvidia-ampere-ga-102-gpu-architecture-whitepaper-v2.pdf",
    _CLUSTERS: "https://github.com/NVIDIA/TensorRT-LLM/blob/v0.17.0/tensorrt_llm/auto_parallel/cluster_info.py",
}
"""Title of a source -> its address. All documents are by NVIDIA."""
_HALF = "half of sparse"


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One row of the table; rates in TFLOP/s (1e12) as printed in their source."""

    name: str
    cuda_names: tuple[str, ...]
    """Names that CUDA gives the GPU, without the brand; a device matches if all words are equal."""
    capability: tuple[int, int] | None
    """None for a GPU that the user describes, which is not in the table."""
    dense_tflops: dict[str, float]
    """dtype -> rate: bfloat16, float16 (both with float32 accumulation), float32, tf32, fp8."""
    sparse_tflops: dict[str, float]
    memory_gb: float
    """Memory as the data sheet prints it, HBM or GDDR: GiB, less what ECC or the driver takes."""
    hbm_byte_s: float
    sources: dict[str, str]
    """dense, sparse, memory, bandwidth -> a title in `DOCUMENTS`, or "half of sparse" if only sparse is printed."""

    @property
    def source(self) -> str:
        """The sources in one line: the document of most figures, then the figures from other documents."""
        documents = list(self.sources.values())
        most = max(documents, key=documents.count)
        others = [f"; {figure}: {document}" for figure, document in self.sources.items() if document != most]
        return f"NVIDIA {most}{''.join(others)}"


class _Chip(NamedTuple):
    """Rates that several GPUs share."""

    capability: tuple[int, int]
    dense: tuple[float | None, float, float | None, float | None, float]
    """Dense rates of bfloat16, float16, tf32, fp8 and float32."""
    sparse: tuple[float, ...] = ()
    """Sparse rates of bfloat16, float16, tf32 and fp8."""
    dense_source: str = ""
    """Title of the document, or "" for the GPU's own document; also for `sparse_source`."""
    sparse_source: str = ""


_DTYPES = ("bfloat16", "float16", "tf32", "fp8", "float32")

# Volta has no bfloat16, no TF32 and no sparsity.
_GV100_SXM2 = _Chip((7, 0), (None, 125, None, None, 15.7))
_GV100_PCIE = _Chip((7, 0), (None, 112, None, None, 14))
_GV100S = _Chip((7, 0), (None, 130, None, None, 16.4))
# Turing has no bfloat16 and no TF32 either.
_TU104_T4 = _Chip((7, 5), (None, 65, None, None, 8.1))
_GA100 = _Chip((8, 0), (312, 312, 156, None, 19.5), (624, 624, 312))
_GA100_A30 = _Chip((8, 0), (165, 165, 82, None, 10.3), (330, 330, 165))
_GA102_A10 = _Chip((8, 6), (125, 125, 62.5, None, 31.2), (250, 250, 125))
# AWS's A10G has fewer tensor core clocks than the A10 and more of the others.
_GA102_A10G = _Chip((8, 6), (70, 70, 35, None, 35), (140, 140, 70))
_GA102_A40 = _Chip((8, 6), (149.7, 149.7, 74.8, None, 37.4), (299.4, 299.4, 149.6))
_GA102_A6000 = _Chip((8, 6), (154.8, 154.8, 77.4, None, 38.7), (309.7, 309.7, 154.8))
_GA102_3090 = _Chip((8, 6), (71, 71, 35.6, None, 35.6), (142, 142, 71))
# A full-clock Hopper module has 132 SMs. H100, H200 and GH200 differ only in memory.
_GH100 = _Chip((9, 0), (989.4, 989.4, 494.7, 1978.9, 66.9), (1979, 1979, 989.4, 3958), _HOPPER)
_GH100_PCIE = _Chip((9, 0), (756, 756, 378, 1513, 51.2), (1513, 1513, 756, 3026), _HOPPER)
# The first H100 NVL data sheet printed the sum of two GPUs at full clocks.
_GH100_NVL = _Chip((9, 0), (835, 835, 417.5, 1671, 60), (1671, 1671, 835, 3341), _HALF)
# The data sheets of H20 and L20 have no public address; the rates here are those that are reported from them. NVIDIA's
# own table confirms them rounded down: 147, 74 and 293 TFLOP/s for the H20, 119, 60 and 238 for the L20.
_GH100_H20 = _Chip((9, 0), (148, 148, 74, 296, 44))
_AD102_L20 = _Chip((8, 9), (119.5, 119.5, 59.8, 239, 59.8))
# The data sheets of B200 and B300 cut TF32 to 2.2 PFLOPS; the HGX table has 18 PFLOPS for eight GPUs, 2.25 each.
_BLACKWELL_HGX = _Chip((10, 0), (2250, 2250, 1125, 4500, 75), (4500, 4500, 2250, 9000), _HALF, _HGX)
_BLACKWELL_ULTRA_HGX = _BLACKWELL_HGX._replace(capability=(10, 3))
# One of the two Blackwell GPUs beside a Grace CPU, whose power limit is higher than on HGX.
_BLACKWELL_GRACE = _Chip((10, 0), (2500, 2500, 1250, 5000, 80), (5000, 5000, 2500, 10000), _HALF)
_BLACKWELL_ULTRA_GRACE = _BLACKWELL_GRACE._replace(capability=(10, 3))
# The data sheet prints 362.05, but 733 for sparse and for FP8.
_AD102_L40S = _Chip((8, 9), (362.05, 362.05, 183, 733, 91.6), (733, 733, 366, 1466))
_AD102_L40 = _Chip((8, 9), (181.05, 181.05, 90.5, 362, 90.5), (362.1, 362.1, 181, 724))
_AD104_L4 = _Chip((8, 9), (121, 121, 60, 242.5, 30.3), (242, 242, 120, 485), _HALF)
_AD102_4090 = _Chip((8, 9), (165.2, 165.2, 82.6, 330.3, 82.6), (330.4, 330.4, 165.2, 660.6))
_AD102_6000 = _Chip((8, 9), (364.2, 364.2, 182.1, 728.5, 91.1), (728.5, 728.5, 364.2, 1457))
_GB202_PRO_6000 = _Chip((12, 0), (503.8, 503.8, 251.9, 1007.6, 126), (1007.6, 1007.6, 503.8, 2015.2))
_GB202_5090 = _Chip((12, 0), (209.5, 209.5, 104.8, 419, 104.8), (419, 419, 209.5, 838))


def _gpu(
    name: str, cuda_names: tuple[str, ...], chip: _Chip, memory_gb: float, hbm_byte_s: float, document: str
) -> Gpu:
    """Returns a row of the table; `document` states every figure for which the chip names no other document."""
    dense, sparse = zip(_DTYPES, chip.dense, strict=True), zip(_DTYPES, chip.sparse, strict=False)
    sources = {"dense": chip.dense_source or document, "sparse": chip.sparse_source or document}
    if not chip.sparse:
        del sources["sparse"]
    return Gpu(
        name=name,
        cuda_names=cuda_names,
        capability=chip.capability,
        dense_tflops={dtype: rate for dtype, rate in dense if rate is not None},
        sparse_tflops=dict(sparse),
        memory_gb=memory_gb,
        hbm_byte_s=hbm_byte_s,
        sources=sources | {"memory": document, "bandwidth": document},
    )


GPUS: tuple[Gpu, ...] = (
    _gpu("V100 SXM2 16 GB", ("V100-SXM2-16GB",), _GV100_SXM2, 16, 900e9, _V100),
    _gpu("V100 SXM2 32 GB", ("V100-SXM2-32GB",), _GV100_SXM2, 32, 900e9, _V100),
    _gpu("V100 PCIe 16 GB", ("V100-PCIE-16GB",), _GV100_PCIE, 16, 900e9, _V100),
    _gpu("V100 PCIe 32 GB", ("V100-PCIE-32GB",), _GV100_PCIE, 32, 900e9, _V100),
    _gpu("V100S PCIe 32 GB", ("V100S-PCIE-32GB",), _GV100S, 32, 1134e9, _V100),
    _gpu("T4", ("T4",), _TU104_T4, 16, 320e9, _T4),
    _gpu("A100 SXM 40 GB", ("A100-SXM4-40GB",), _GA100, 40, 1555e9, _A100),
    _gpu("A100 SXM 80 GB", ("A100-SXM4-80GB", "A100-SXM-80GB"), _GA100, 80, 2039e9, _A100),
    _gpu("A100 PCIe 40 GB", ("A100-PCIE-40GB",), _GA100, 40, 1555e9, _A100),
    _gpu("A100 PCIe 80 GB", ("A100 80GB PCIe", "A100-PCIE-80GB"), _GA100, 80, 1935e9, _A100),
    # A800 and H800 are A100 and H100 whose NVLink is limited to 400 GB/s.
    _gpu("A800 SXM 80 GB", ("A800-SXM4-80GB",), _GA100, 80, 2039e9, _A100),
    _gpu("A800 PCIe 80 GB", ("A800 80GB PCIe",), _GA100, 80, 1935e9, _A100),
    _gpu("A30", ("A30",), _GA100_A30, 24, 933e9, _A30),
    _gpu("A10", ("A10",), _GA102_A10, 24, 600e9, _A10),
    _gpu("A10G", ("A10G",), _GA102_A10G, 24, 600e9, _A10G),
    _gpu("A40", ("A40",), _GA102_A40, 48, 696e9, _A40),
    _gpu("RTX A6000", ("RTX A6000",), _GA102_A6000, 48, 768e9, _GA102),
    _gpu("RTX 3090", ("RTX 3090",), _GA102_3090, 24, 936e9, _GA102),
    _gpu("H100", ("H100 80GB HBM3", "H100 SXM5 80GB"), _GH100, 80, 3350e9, _H100),
    _gpu("H100 PCIe", ("H100 PCIe",), _GH100_PCIE, 80, 2000e9, _H100),
    _gpu("H100 NVL", ("H100 NVL",), _GH100_NVL, 94, 3900e9, _H100_NVL),
    _gpu("H800", ("H800",), _GH100, 80, 3350e9, _H100),
    _gpu("H800 PCIe", ("H800 PCIe",), _GH100_PCIE, 80, 2000e9, _H100),
    _gpu("H20", ("H20",), _GH100_H20, 96, 4000e9, _CLUSTERS),
    _gpu("H200", ("H200",), _GH100, 141, 4800e9, _H200),
    _gpu("H200 NVL", ("H200 NVL",), _GH100_NVL, 141, 4800e9, _H200),
    # The size in these two CUDA names is the memory of the Grace CPU.
    _gpu("GH200 96 GB", ("GH200 480GB", "GH200 120GB"), _GH100, 96, 4000e9, _GH200),
    _gpu("GH200 144 GB", ("GH200 144G HBM3e",), _GH100, 144, 4900e9, _GH200),
    # Early tables state 192 GB and 8 TB/s for the B200; its driver reports a bus of 7,680 bits, which is 7.7 TB/s.
    _gpu("B200", ("B200",), _BLACKWELL_HGX, 180, 7.7e12, _BLACKWELL),
    _gpu("GB200", ("GB200",), _BLACKWELL_GRACE, 186, 8e12, _GB200),
    _gpu("B300", ("B300 SXM6 AC", "B300"), _BLACKWELL_ULTRA_HGX, 270, 7.7e12, _BLACKWELL_ULTRA),
    _gpu("GB300", ("GB300",), _BLACKWELL_ULTRA_GRACE, 279, 8e12, _GB300),
    _gpu("L40S", ("L40S",), _AD102_L40S, 48, 864e9, _L40S),
    _gpu("L40", ("L40",), _AD102_L40, 48, 864e9, _L40),
    _gpu("L20", ("L20",), _AD102_L20, 48, 864e9, _CLUSTERS),
    _gpu("L4", ("L4",), _AD104_L4, 24, 300e9, _L4),
    _gpu("RTX 4090", ("RTX 4090",), _AD102_4090, 24, 1008e9, _ADA),
    _gpu("RTX 6000 Ada", ("RTX 6000 Ada Generation",), _AD102_6000, 48, 960e9, _RTX_PRO),
    _gpu(
        "RTX PRO 6000 Blackwell",
        ("RTX PRO 6000 Blackwell Workstation Edition",),
        _GB202_PRO_6000,
        96,
        1792e9,
        _RTX_PRO,
    ),
    _gpu("RTX 5090", ("RTX 5090",), _GB202_5090, 32, 1792e9, _RTX),
)
"""The rows of the table."""
