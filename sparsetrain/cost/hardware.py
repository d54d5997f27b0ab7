"""What operations and memory accesses cost on a machine, as data.

The constants of the profiles are published:

- Horowitz, "Computing's energy problem (and what we can do about it)", ISSCC 2014, figure 1.1.9;
- Chen, Emer and Sze, "Eyeriss: a spatial architecture for energy-efficient dataflow for
  convolutional neural networks", ISCA 2016, table IV;
- Chen, Krishna, Emer and Sze, "Eyeriss: an energy-efficient reconfigurable accelerator for deep
  convolutional neural networks", JSSC 2017.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from sparsetrain.config import Config
from sparsetrain.data_files import dump_data, parse_data, read_text

# Horowitz 2014: picojoules of a multiplication and an addition. Products of 8 bits are added in 32.
_HOROWITZ_MAC = {32: 3.7 + 0.9, 16: 1.1 + 0.4, 8: 0.2 + 0.1}


class Hardware(Config):
    """An accelerator: an array of multipliers with registers, a buffer, and DRAM behind it.

    Rows of the array work on different positions (or tokens, or samples), columns on different
    outputs. Make your own with `Hardware(...)`, from a file with `load`, or from a profile with
    other values: `Hardware.eyeriss(buffer_bytes=2**20)`.
    """

    name: str = Field("custom", description="shown in reports")
    mac_pj: float = Field(ge=0, description="energy of a multiply-add, in picojoules")
    register_pj: float = Field(
        ge=0, description="energy of a byte read from or written to a unit's registers, in pJ"
    )
    array_pj: float = Field(
        ge=0, description="energy of a byte passed from a unit of the array to the next, in pJ"
    )
    buffer_pj: float = Field(
        ge=0, description="energy of a byte read from or written to the buffer, in pJ"
    )
    dram_pj: float = Field(ge=0, description="energy of a byte read from or written to DRAM, in pJ")
    buffer_bytes: int = Field(ge=0, description="size of the buffer that all units share, in bytes")
    rows: int = Field(1, ge=1, description="units that share a weight read from the buffer")
    columns: int = Field(1, ge=1, description="units that share an input read from the buffer")
    weight_bits: int = Field(16, ge=1, description="bits of a weight")
    activation_bits: int = Field(16, ge=1, description="bits of an input or an output")
    sum_bits: int = Field(16, ge=1, description="bits of a sum while it is added to")
    index_bits: int = Field(
        5, ge=1, le=32, description="bits of a run length where weights are stored as runs of zeros"
    )
    zeros: Literal["kept", "compressed", "skipped"] = Field(
        "skipped",
        description="weights that are 0: kept, stored and multiplied as any other; compressed, not "
        "stored in DRAM, but unpacked into the buffer and multiplied; skipped, not stored at all "
        "and not multiplied",
    )
    input_reuse: float = Field(
        0.0,
        ge=0,
        le=1,
        description="how much of the sharing of inputs unstructured zeros leave where zeros are "
        "skipped: 0, columns stay in step and an input is read where any of them needs it; 1, as "
        "if all columns had their zeros in the same places",
    )

    @classmethod
    def eyeriss(cls, mac_pj: float = 1.0, **changes: Any) -> Hardware:
        """Eyeriss: 16 bits, 12 x 14 units, a buffer of 108 KB; a 16-bit access costs as many MACs.

        Register 1, array 2, buffer 6, DRAM 200 (ISCA 2016, table IV; sizes and run lengths of 5
        bits from JSSC 2017). That zeros of weights are skipped is the assumption of Yang et al.
        2017, not the chip's.

        Args:
            mac_pj: energy of a 16-bit multiply-add in picojoules. The papers give only ratios; with
                1, results read as multiples of a multiply-add.
            changes: other values for fields.
        """
        ratios = {"register_pj": 1, "array_pj": 2, "buffer_pj": 6, "dram_pj": 200}
        values = {
            "name": "Eyeriss",
            "mac_pj": mac_pj,
            **{field: mac_pj * ratio / 2 for field, ratio in ratios.items()},  # 2 bytes an access
            "buffer_bytes": 108 * 1024,
            "rows": 12,
            "columns": 14,
        }
        return cls(**(values | changes))

    @classmethod
    def horowitz_45nm(cls, bits: Literal[32, 16, 8] = 32, **changes: Any) -> Hardware:
        """Constants of 45 nm and 0.9 V (Horowitz, ISSCC 2014, figure 1.1.9).

        A multiplication and an addition in float32, float16 or int8; 20 pJ for 64 bits of a 32 KB
        SRAM; 1.3 to 2.6 nJ for 64 bits of DRAM, of which the middle is taken. The table has no
        array. Units pass bytes on and keep them at Eyeriss's ratios to the buffer, 2/6 and 1/6, and
        16 x 16 of them are assumed.

        Args:
            bits: of weights and activations. Sums have as many, those of int8 32.
            changes: other values for fields.

        Raises:
            ValueError: the table has no numbers of that many bits.
        """
        if bits not in _HOROWITZ_MAC:
            raise ValueError(f"bits is one of 32, 16 and 8, not {bits}")
        buffer_pj = 20 / 8
        values = {
            "name": f"Horowitz 45 nm, {bits} bits",
            "mac_pj": _HOROWITZ_MAC[bits],
            "register_pj": buffer_pj / 6,
            "array_pj": buffer_pj / 3,
            "buffer_pj": buffer_pj,
            "dram_pj": (1300 + 2600) / 2 / 8,
            "buffer_bytes": 32 * 1024,
            "rows": 16,
            "columns": 16,
            "weight_bits": bits,
            "activation_bits": bits,
            "sum_bits": 32 if bits == 8 else bits,
        }
        return cls(**(values | changes))

    @classmethod
    def load(cls, path: str | Path) -> Hardware:
        """Read a profile from a .yaml, .yml or .json file.

        Raises:
            ValueError: the file is missing, or holds no valid profile.
        """
        data = parse_data(read_text(Path(path), "hardware profile"), str(path))
        try:
            return cls.model_validate(data)
        except ValueError as error:
            raise ValueError(f"{path} is no hardware profile: {error}") from error

    def dump(self, path: str | Path) -> None:
        """Write YAML, or JSON when the name ends in .json."""
        dump_data(self.model_dump(), Path(path))
