"""Commands whose processes share the prompts: they print once what one process prints, and refuse together."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from opd.cli import main
from tests.end_to_end.test_processes import ACCELERATE, TORCHRUN, launched

LIMIT = 120  # seconds; a command whose processes wait for each other forever fails
PAIR = "--student {} --teacher {} --prompts embedded:ledger-short --max-new-tokens 12"
COMMANDS = {
    "eval": "eval --model {} --against {} --prompts embedded:ledger-short --limit 7 --samples 2 --temperature 1 "
    "--max-new-tokens 12 --json --out OUT/scores.jsonl",
    "variance": f"variance {PAIR} --rollouts 7 --methods vopd,gkd --json",
    "rock": f"rock {PAIR} --rollouts 9 --decode-rows 5 --context-filter --before {{}} --out OUT/rocks.json",
}
FILES = {"eval": {"scores.jsonl"}, "variance": set(), "rock": {"rocks.json", "rocks-control.json"}}
# The numbers of the rollouts that each of two processes generates: of two models, of one, of two batches of prompts.
PARTS = {
    "eval": [[[*range(8)]] * 2, [[*range(8, 14)]] * 2],
    "variance": [[[0, 1, 2, 3]], [[4, 5, 6]]],
    "rock": [[[0, 1, 2], [0, 1]], [[3, 4], [2, 3]]],
}
# Processes that note the rollouts which they generate, or of which the second one refuses to generate any.
SCRIPT = """
import os, sys
from opd.cli import main
from opd.core.errors import Refusal
from opd.rollouts.engines.hf import HFEngine

task, folder, *words = sys.argv[1:]
generate = HFEngine.generate

def noted(self, request):
    if task == "refuse" and os.environ["RANK"] == "1":
        raise Refusal("--model: the second process cannot generate")
    with open(f"{folder}/rank-{os.environ['RANK']}", "a") as file:
        print(list(request.index), file=file)
    return generate(self, request)

HFEngine.generate = noted
sys.exit(main(words))
"""


def words(command: str, pair: tuple[Path, Path], out: Path) -> list[str]:
    """Return the arguments of a command on two tiny models."""
    return COMMANDS[command].format(*pair, pair[0]).replace("OUT", str(out)).split()


def two_processes(folder: Path, arguments: list[str], task: str = "note") -> tuple[subprocess.Popen, str, str]:
    """Run SCRIPT in two connected processes; return the launcher with its stdout and stderr."""
    script = folder / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, str(script), task, str(folder), *arguments]
    return ended(launched(command, [*TORCHRUN, "2"], ACCELERATE_USE_CPU="true"))


def ended(run: subprocess.Popen) -> tuple[subprocess.Popen, str, str]:
    """Wait for a launcher, and end it with its processes if they hang; return it with its stdout and stderr."""
    try:
        return run, *run.communicate(timeout=LIMIT)
    except subprocess.TimeoutExpired:
        run.terminate()
        raise AssertionError(f"the processes hang: {run.communicate()[1]}") from None


def refusal(run: subprocess.Popen, err: str) -> str:
    """Return the only refusal of two processes, which both ended with 2."""
    assert run.returncode == 1 and err.count("exitcode  : 2 ") == 2, err  # torchrun's code, and its report
    (line,) = [line for line in err.splitlines() if line.startswith("opd: ")]
    return line


def close(result: object, expected: object) -> bool:
    """Return whether two json values are equal up to the order of float sums."""
    if isinstance(expected, dict):
        return result.keys() == expected.keys() and all(close(result[key], expected[key]) for key in expected)
    if isinstance(expected, list):
        return len(result) == len(expected) and all(map(close, result, expected))
    return result == (pytest.approx(expected, rel=1e-6, nan_ok=True) if isinstance(expected, float) else expected)


def contents(folder: Path) -> dict[str, object]:
    """Return the json files of a folder, by name."""
    lists = {file.name: list(map(json.loads, file.read_text().splitlines())) for file in folder.glob("*.jsonl")}
    return lists | {file.name: json.loads(file.read_text()) for file in folder.glob("*.json")}


@pytest.mark.parametrize("command", COMMANDS)
def test_two_processes_share_the_prompts_and_print_what_one_prints(pair, tmp_path, capsys, command):
    one, two = tmp_path / "one", tmp_path / "two"
    two.mkdir()
    assert main(words(command, pair, one)) == 0
    printed = capsys.readouterr().out.replace(str(one), str(two))
    run, out, err = two_processes(two, words(command, pair, two))
    assert run.returncode == 0, err
    parts = [[json.loads(line) for line in (two / f"rank-{rank}").read_text().splitlines()] for rank in (0, 1)]
    assert parts == PARTS[command]
    assert out == printed if command == "rock" else close(json.loads(out), json.loads(printed))
    assert contents(two).keys() == FILES[command] and close(contents(two), contents(one))


def test_more_processes_than_prompts(pair, tmp_path):
    run, out, err = two_processes(tmp_path, [*words("eval", pair, tmp_path), "--limit", "1"])
    assert run.returncode == 0, err
    assert [model["prompts"] for model in json.loads(out)["models"]] == [1, 1]


@pytest.mark.parametrize("command", COMMANDS)
def test_what_one_process_refuses_ends_both_with_one_line(pair, tmp_path, command):
    run, out, err = two_processes(tmp_path, words(command, pair, tmp_path), "refuse")
    assert refusal(run, err) == "opd: --model: the second process cannot generate"
    assert not out and not contents(tmp_path)


def test_a_run_that_one_process_refuses_before_its_first_step_leaves_no_folder(pair, tmp_path):
    flags = f"train {PAIR} --steps 1 --out {tmp_path / 'run'} vopd".format(*pair).split()
    run, out, err = two_processes(tmp_path, flags, "refuse")
    assert refusal(run, err) == "opd: --model: the second process cannot generate"
    assert not out and not (tmp_path / "run").exists()


def test_what_both_processes_refuse_is_printed_once(pair, tmp_path):
    run, out, err = two_processes(tmp_path, [*words("eval", pair, tmp_path), "--temperature", "0"])
    assert refusal(run, err).startswith("opd: --samples 2: greedy samples are all the same") and not out


def test_a_full_disk_of_the_main_process_ends_both_after_the_numbers(pair, tmp_path):
    run, out, err = two_processes(tmp_path, [*words("eval", pair, tmp_path), "--out", "/dev/full"])
    assert refusal(run, err).startswith("opd: --out /dev/full: No space left on device")
    assert [model["prompts"] for model in json.loads(out)["models"]] == [7, 7]


def test_a_command_that_cannot_share_its_work_is_refused(tmp_path):
    run, out, err = two_processes(tmp_path, ["report", "outputs/opd", "--out", str(tmp_path / "report.html")])
    assert "opd report: it runs in one process, and the launcher started 2; run it without torchrun" in refusal(
        run, err
    )
    assert not out and not (tmp_path / "report.html").exists()


FSDP = """
compute_environment: LOCAL_MACHINE
distributed_type: FSDP
fsdp_config: {{fsdp_version: {version}, fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP}}
mixed_precision: bf16
num_machines: 1
num_processes: 2
"""


@pytest.mark.parametrize("engine", ["FSDP1", "FSDP2", "DeepSpeed"])
def test_a_configuration_of_accelerate_that_shards_is_refused_and_named(pair, tmp_path, engine):
    flags = "train --student {} --teacher {} --prompts embedded:ledger-short".format(*pair).split()
    arguments = [sys.executable, "-m", "opd", *flags, "--out", str(tmp_path / "run"), "vopd"]
    if engine == "DeepSpeed":  # accelerate launch ends by itself if it is not installed
        run = launched(arguments, [*TORCHRUN, "2"], ACCELERATE_USE_DEEPSPEED="true")
    else:
        configuration = tmp_path / "accelerate.yaml"
        configuration.write_text(FSDP.format(version=engine[-1]))
        run = launched(arguments, [*ACCELERATE, "--config_file", str(configuration)])
    run, out, err = ended(run)
    line = refusal(run, err)
    assert f"asks for {engine.rstrip('12')}, which" in line
    assert "use torchrun --nproc_per_node N -m opd train --shard ..." in line
    assert not out and not (tmp_path / "run").exists()
