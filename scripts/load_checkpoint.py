"""Load checkpoints as other programs do: `python scripts/load_checkpoint.py CHECKPOINT ...`; fails where one cannot.

Each is opened with plain transformers, or with plain peft where it is an adapter, and its weight files are selected as
vLLM selects them: every *.safetensors file at the top level, unless an index names fewer.  Where vLLM is installed, its
loader selects them itself.
"""

import importlib.util
import sys
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer


def weight_files(folder: Path) -> list[Path]:
    """Return the files that vLLM reads weights from."""
    if importlib.util.find_spec("vllm") is None:
        return sorted(folder.glob("*.safetensors"))
    from vllm.config import LoadConfig
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    loader = DefaultModelLoader(LoadConfig())
    _, files, *_ = loader._prepare_weights(str(folder), None, None, False, None)
    return [Path(file) for file in files]


def load(folder: Path) -> torch.nn.Module:
    """Load a checkpoint with plain transformers or plain peft."""
    if (folder / "adapter_config.json").is_file():
        from peft import AutoPeftModelForCausalLM

        return AutoPeftModelForCausalLM.from_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder)


def check(folder: Path) -> None:
    """Load a checkpoint, generate with it, and compare its tensors with those of the selected files."""
    model = load(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer("Mia has 4 coins.", return_tensors="pt", return_token_type_ids=False)
    response = model.generate(**prompt, max_new_tokens=8, do_sample=False)
    expected = {name.replace(".default.", ".") for name in model.state_dict()}
    names: list[str] = []
    for file in weight_files(folder):
        with safe_open(file, "pt") as tensors:
            names += tensors.keys()
    unknown = sorted(set(names) - expected)
    if unknown or not names:
        raise SystemExit(f"{folder}: the weight files hold {unknown or 'no tensor'}, which the model does not have")
    if len(names) != len(set(names)):
        raise SystemExit(f"{folder}: two weight files hold the same tensor")
    print(f"{folder.parts[-3]}/{folder.name}: {len(names)} tensors, {tokenizer.decode(response[0])!r}")


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        check(Path(argument))
