"""`opd inspect`: writes a page that shows every token of saved rollouts, `inspect(Inspect(...)) -> path`."""

import base64
import gzip
from collections.abc import Mapping
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from opd.analysis.report.page import page_file, write
from opd.config.commands import Inspect
from opd.training.run_files import SavedRollouts, read_rollouts
from opd.training.run_log import saved_at

TITLES: Mapping[str, str] = {  # columns for colouring tokens -> their titles
    "reverse_kl": "reverse KL",
    "student_entropy": "student entropy",
    "teacher_entropy": "teacher entropy",
    "student_logp": "student log p",
    "teacher_logp": "teacher log q",
    "hidden_distance": "hidden distance",
}


def inspect(config: Inspect) -> Path:
    """Read the rollouts, write the page; returns its path."""
    file = page_file("inspect", config, (config.run,))
    file.check()
    step, path = saved_at(config.run, config.step)
    write(file, "inspect", payload(config.run, step, read_rollouts(path)))
    return config.out


def payload(run: Path, step: int, rollouts: SavedRollouts) -> dict[str, object]:
    """Return the rollouts and their columns, flat over response tokens; row b has those at [start[b], start[b + 1])."""
    rows, columns, names = rollouts.rows, rollouts.columns, list(rollouts.texts)
    mask = columns["mask"]
    lengths = torch.tensor([row["tokens"] for row in rows])
    is_response = torch.arange(mask.shape[1]) < lengths[:, None]
    token_index = torch.zeros(1 + max(names), dtype=torch.long)
    token_index[torch.tensor(names)] = torch.arange(len(names))
    columns_by_title = {title: columns[name] for name, title in TITLES.items() if name in columns}
    if "student_logp" in columns and "teacher_logp" in columns:
        columns_by_title = {"log ratio r": columns["teacher_logp"] - columns["student_logp"], **columns_by_title}
    if "reverse_kl" in columns:
        columns_by_title["rock score"] = rock_shares(columns["ids"].long(), mask, columns["reverse_kl"])
    terms = sum(name.startswith("weight.") for name in columns)
    for i in range(terms):
        number = f" {i + 1}" if terms > 1 else ""
        if f"advantage.{i}" in columns:
            columns_by_title[f"advantage{number}"] = columns[f"advantage.{i}"]
        columns_by_title[f"weight{number}"] = columns[f"weight.{i}"] * mask.sum()  # 1 in the mean over tokens
    data: dict[str, object] = {
        "run": str(run),
        "step": step,
        "rollouts": rows,
        "start": [0, *lengths.cumsum(0).tolist()],
        "tokens": list(rollouts.texts.values()),
        "names": names,
        "ids": packed(token_index[columns["ids"].long()][is_response].to(torch.int32)),
        "trained": packed(mask[is_response].to(torch.uint8)),
        "columns": {
            title: packed(rounded(x.float().where(mask, torch.nan)[is_response], 12))
            for title, x in columns_by_title.items()
        },
    }
    if "alternatives_ids" in columns:
        ids = columns["alternatives_ids"].long()
        data |= {"width": ids.shape[-1], "alternatives": packed(token_index[ids][is_response].to(torch.int32))}
        for name in ("student_logp", "teacher_logp"):
            data[f"alternatives_{name}"] = packed(columns[f"alternatives_{name}"][is_response].to(torch.bfloat16))
    return data


def rock_shares(
    ids: Int[Tensor, "B T"], mask: Bool[Tensor, "B T"], reverse_kl: Float[Tensor, "B T"]
) -> Float[Tensor, "B T"]:
    """Return each token type's share of the summed reverse KL of the trained tokens.  Rock Tokens, arXiv:2605.09253."""
    score = ids[mask].bincount(reverse_kl[mask].double(), minlength=int(ids.max()) + 1)
    return (score / score.sum().clamp(min=torch.finfo(score.dtype).tiny))[ids].float()


def rounded(x: Tensor, bits: int) -> Tensor:
    """Zero the last mantissa bits of an fp32 tensor: three significant digits remain, and gzip compresses it well."""
    return ((x.contiguous().view(torch.int32) >> bits) << bits).view(torch.float32)


def packed(x: Tensor) -> str:
    """Encode a tensor as "dtype:bytes", the bytes little-endian, gzipped, in base64; ids in 16 bits if they fit."""
    if x.dtype == torch.bfloat16:
        kind, array = "b16", x.contiguous().view(torch.int16).numpy()
    elif x.dtype == torch.int32 and (x.numel() == 0 or int(x.max()) < 1 << 16):
        kind, array = "u16", x.numpy().astype("<u2")
    else:
        array = x.contiguous().numpy()
        kind = f"{array.dtype.kind}{8 * array.itemsize}"
    return f"{kind}:{base64.b64encode(gzip.compress(array.tobytes(), 6, mtime=0)).decode()}"
