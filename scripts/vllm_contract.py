"""Read from vLLM's sources what opd calls: `python scripts/vllm_contract.py [FOLDER ...]` writes a json.

A FOLDER holds the package `vllm`, as an unpacked wheel does; without one it is the installed package.  Nothing of it is
imported: signatures, fields and routes are read from the syntax, so a GPU build is as good as any.
tests/rollouts/test_vllm.py checks our calls against tests/vllm_contract.json, and the json against an installed vLLM.
"""

import ast
import importlib.util
import json
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

WRITTEN = Path(__file__).parents[1] / "tests" / "vllm_contract.json"
WEIGHTS, TOKENS = "distributed/weight_transfer", "entrypoints/scale_out/token_in_token_out"
CALLABLES = {  # file -> functions and methods whose parameters are read
    "entrypoints/llm.py": ["LLM.__init__", "LLM.generate", "LLM.sleep", "LLM.wake_up", "LLM.reset_prefix_cache"],
    "entrypoints/rl/offline.py": [
        f"RLOfflineMixin.{name}"
        for name in (
            "init_weight_transfer_engine",
            "start_weight_update",
            "update_weights",
            "finish_weight_update",
        )
    ],
    f"{WEIGHTS}/factory.py": [
        "WeightTransferEngineFactory.register_engine",
        "WeightTransferTrainerFactory.trainer_init",
    ],
    f"{WEIGHTS}/clients.py": ["HTTPVLLMWeightSyncClient.__init__"],
    f"{WEIGHTS}/base.py": [
        *(
            f"WeightTransferEngine.{name}"
            for name in (
                "init_transfer_engine",
                "start_weight_update",
                "update_weights",
                "receive_weights",
                "finish_weight_update",
                "shutdown",
            )
        ),
        "ModuleSource.__init__",
        "TrainerWeightTransferEngine.send_weights",
    ],
    "model_executor/model_loader/reload/layerwise.py": ["initialize_layerwise_reload", "finalize_layerwise_reload"],
    "utils/network_utils.py": ["get_ip", "get_open_port"],
    "distributed/parallel_state.py": ["cleanup_dist_env_and_memory"],
}
CLASSES = {  # file -> classes whose fields are read, including inherited fields
    "engine/arg_utils.py": ["EngineArgs"],
    "sampling_params.py": ["SamplingParams"],
    "entrypoints/launchers/cli_args.py": ["FrontendArgs"],
    "outputs.py": ["CompletionOutput", "WeightVersionSpan"],
    "logprobs.py": ["FlatLogprobs"],
    "config/weight_transfer.py": ["WeightTransferConfig"],
    f"{WEIGHTS}/base.py": ["TrainerInitInfo", "WeightTransferInitInfo", "WeightTransferUpdateInfo"],
    f"{WEIGHTS}/nccl_engine.py": ["NCCLTrainerInitInfo"],
    f"{WEIGHTS}/ipc_engine.py": ["IPCTrainerInitInfo"],
    f"{TOKENS}/protocol.py": [
        "GenerateRequest",
        "GenerateTokensResponse",
        "GenerateTokensChoice",
        "GenerateLogProbsContent",
        "GenerateLogProb",
    ],
    "entrypoints/openai/completion/protocol.py": ["CompletionRequest", "CompletionResponseChoice"],
}
MOVED = {"entrypoints/launchers/cli_args.py": "entrypoints/common/cli_args.py"}  # path in the CUDA build of 0.33
ROUTERS = (  # files whose routes are read
    "entrypoints/rl/online/api_router.py",
    "entrypoints/serve/dev/cache/api_router.py",
    f"{TOKENS}/api_router.py",
    "entrypoints/openai/completion/api_router.py",
    "entrypoints/serve/instrumentator/health.py",
)
Def = ast.FunctionDef | ast.AsyncFunctionDef


def parameters(node: Def) -> list[str]:
    """Return the names of a function's parameters without self and cls."""
    a = node.args
    names = [x.arg for x in (*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, (a.vararg, a.kwarg)))]
    return [name for name in names if name not in ("self", "cls")]


def members(body: list[ast.stmt]) -> dict[str, ast.stmt]:
    """Return classes and functions by name, including those under an `if`."""
    out: dict[str, ast.stmt] = {}
    for node in body:
        if isinstance(node, Def | ast.ClassDef):
            out.setdefault(node.name, node)
        elif isinstance(node, ast.If):
            out |= members(node.body)
    return out


def own_fields(node: ast.ClassDef) -> list[str]:
    """Return the public annotated names in the body of a class."""
    names = [x.target.id for x in node.body if isinstance(x, ast.AnnAssign) and isinstance(x.target, ast.Name)]
    return [name for name in names if not name.startswith("_")]


def all_fields(classes: dict[str, ast.stmt], node: ast.ClassDef) -> list[str]:
    """Return the fields of a class, including those of base classes in `classes`."""
    out: list[str] = []
    for base in node.bases:
        if isinstance(base, ast.Name) and isinstance(parent := classes.get(base.id), ast.ClassDef):
            out += all_fields(classes, parent)
    return list(dict.fromkeys(out + own_fields(node)))


def routes(tree: ast.Module) -> dict[str, list[str]]:
    """Return `METHOD /path` -> parameters for functions decorated with @router.get or @router.post."""
    out = {}
    for node in ast.walk(tree):
        if not isinstance(node, Def):
            continue
        marks = [m for m in node.decorator_list if isinstance(m, ast.Call) and isinstance(m.func, ast.Attribute)]
        for mark in marks:
            if mark.func.attr in ("get", "post") and mark.args and isinstance(mark.args[0], ast.Constant):
                out[f"{mark.func.attr.upper()} {mark.args[0].value}"] = parameters(node)
    return out


def exported(root: Path, module: str) -> list[str]:
    """Return the names that `from MODULE import ...` may import: those defined or imported in the module."""
    path = root.joinpath(*module.split(".")[1:])
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    tree, names = ast.parse(path.read_text()), set[str]()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom | ast.Import):
            names |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, Def | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Dict):  # vllm/__init__.py lists its lazy attributes in a dict
            names |= {key.value for key in node.keys if isinstance(key, ast.Constant) and isinstance(key.value, str)}
    return sorted(names)


def imported() -> dict[str, list[str]]:
    """Return the names that opd imports from vllm, by module."""
    out: dict[str, set[str]] = {}
    for path in (WRITTEN.parents[1] / "opd").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "vllm":
                out.setdefault(node.module, set()).update(alias.name for alias in node.names)
    return {module: sorted(names) for module, names in sorted(out.items())}


def place(root: Path, file: str) -> Path:
    """Return the path of a file in this version of the package."""
    return root / file if (root / file).is_file() else root / MOVED[file]


def contract(root: Path) -> dict[str, dict[str, list[str]]]:
    """Return the contract of a package folder: parameters, fields, routes and imported names."""
    trees = {file: ast.parse(place(root, file).read_text()) for file in {*CALLABLES, *CLASSES, *ROUTERS}}
    base = members(trees[f"{WEIGHTS}/base.py"].body)
    callables, classes, served = {}, {}, {}
    for file, names in CALLABLES.items():
        for name in names:
            scope = members(trees[file].body)
            *owner, last = name.split(".")
            if owner:
                scope = members(scope[owner[0]].body)  # type: ignore[attr-defined]
            definition = scope[last]
            assert isinstance(definition, Def)
            callables[name] = parameters(definition)
    for file, names in CLASSES.items():
        known_classes = base | members(trees[file].body)
        for name in names:
            definition = known_classes[name]
            assert isinstance(definition, ast.ClassDef)
            classes[name] = all_fields(known_classes, definition)
    for file in ROUTERS:
        served |= routes(trees[file])
    offered = {module: exported(root, module) for module in imported()}
    names = {module: [x for x in used if x in offered[module]] for module, used in imported().items()}
    return {"callables": callables, "classes": classes, "routes": served, "imports": names}


def installed() -> Path | None:
    """Return the folder of the installed package, or None."""
    spec = importlib.util.find_spec("vllm")
    return None if spec is None or not spec.submodule_search_locations else Path(spec.submodule_search_locations[0])


def named(root: Path) -> str:
    """Return name and version of a package folder, from the .dist-info folder next to it or the installed package."""
    folders = sorted(root.parent.glob("vllm*-[0-9]*.dist-info"))
    if folders:
        name, number = folders[0].name.removesuffix(".dist-info").rsplit("-", 1)
        return f"{name.replace('_', '-')} {number}"
    try:
        return f"vllm {version('vllm')}"
    except PackageNotFoundError:
        return "vllm"


def main() -> None:
    roots = [Path(folder) / "vllm" for folder in sys.argv[1:]] or [installed()]
    if None in roots:
        raise SystemExit("vllm is not installed: name the folders of unpacked wheels")
    WRITTEN.write_text(json.dumps({named(root): contract(root) for root in roots}, indent=1) + "\n")


if __name__ == "__main__":
    main()
