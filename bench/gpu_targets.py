"""The aims of the GPU kernels, as ratios of one run of ``python -m bench gpu``."""

from __future__ import annotations


def targets(rows: list[dict]) -> list[dict]:
    """The aims of the kernels, as ratios of this run."""
    found: list[dict] = []

    def aim(what: str, row: dict, over: str, under: str, least: float) -> None:
        if over in row and under in row:
            value = row[over] / row[under]
            where = f"{row['part']} {row['N x K']} M={row['M']}"
            found.append({"target": what, "at": where, "value": value, "aim >=": least, "met": value >= least})

    speedups = {"8192x28672": 3.3, "14336x4096": 2.8, "4096x14336": 2.8, "4096x4096": 2.0}
    by_place = {(row["part"], row["N x K"], row["M"]): row for row in rows}
    for row in rows:
        m, size = row["M"], row["N x K"]
        if row["part"] == "decode":
            if m == 1:
                aim("nf4 against bf16", row, "bf16 linear", "nf4", speedups.get(size, 2.0))
                aim("nf4 against bitsandbytes", row, "bitsandbytes nf4", "nf4", 1.8)
                aim("nf4 against it with r=16", row, "nf4", "nf4 r=16", 1 / 1.05)
                aim("nf4 against it with r=64", row, "nf4", "nf4 r=64", 1 / 1.15)
                if size == "8192x28672":
                    aim("nf2 against bf16", row, "bf16 linear", "nf2", 5.0)
            if 8 <= m <= 64 and size == "4096x4096":
                aim("nf4 against bitsandbytes", row, "bitsandbytes nf4", "nf4", 3.0)
            if m == 16 and "nf4" in by_place.get(("decode", size, 1), {}):
                flat = {**row, "M=1": by_place["decode", size, 1]["nf4"]}
                aim("nf4: M=1 against M=16", flat, "M=1", "nf4", 1 / 1.15)
        elif row["part"] == "prefill" and m >= 256:
            aim("nf4 against bf16", row, "bf16 linear", "nf4", 0.8 if m == 256 else 0.9)
        elif row["part"] == "backward" and m == 2048:
            aim("nf4 grad_x against bf16", row, "bf16 matmul", "nf4", 0.85)
    return found
