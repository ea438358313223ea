"""Prompt files that nobody should write: `opd eval` reads them, or refuses them in a line.

Each attempt is a file of a list of known traps, or a mutation of a good file.  An attempt is lost if the command
crashes, hangs or breaks its promise, or if a text of the file was run as code.
"""

import io
import json
import random
import struct
from pathlib import Path

import datasets  # noqa: F401  # before the forks
import pyarrow
import pyarrow.parquet

import opd.analysis.evaluate
import opd.data.tasks.tables  # noqa: F401
from tests.campaigns import Counts
from tests.campaigns.commands import run_command

SECONDS = 60


def lines(*rows: object) -> bytes:
    """Return rows as JSON lines."""
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def deep(count: int, opening: bytes = b"[", closing: bytes = b"]") -> bytes:
    """Return a row with a column that is nested."""
    return b'{"prompt": "x", "answer": "1", "d": ' + opening * count + b"1" + closing * count + b"}\n"


def turns(*messages: object) -> bytes:
    """Return a row of chat messages."""
    return lines({"messages": list(messages), "answer": "1"})


def parquet(**columns: list) -> bytes:
    """Return a table as a file."""
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), file)
    return file.getvalue()


GOOD = {"prompt": "1+1?", "answer": "2"}
FIELD = lambda value: b'{"prompt": "a", "answer": ' + value + b"}\n"
JSONL = {
    "empty": b"",
    "blank": b"\n\n \n",
    "null": b"null\n",
    "null after a row": lines(GOOD) + b"null\n",
    "list": b"[]\n",
    "numbers": b"1\n2\n",
    "string": b'"a"\n',
    "empty object": b"{}\n",
    "one list": json.dumps([GOOD, GOOD]).encode(),
    "truncated": lines(GOOD, GOOD)[:-9],
    "CRLF": lines(GOOD, GOOD).replace(b"\n", b"\r\n"),
    "CR": lines(GOOD, GOOD).replace(b"\n", b"\r"),
    "closing comma": b'{"prompt": "a", "answer": "1",}\n',
    "single quotes": b"{'prompt': 'a'}\n",
    "repeated key": b'{"prompt": "a", "prompt": "b", "answer": "1"}\n',
    "NaN": FIELD(b"NaN"),
    "infinity": FIELD(b"Infinity"),
    "400 digits": FIELD(b"9" * 400),
    "5000 digits": FIELD(b"9" * 5000),
    "1e999": FIELD(b"1e999"),
    "numbers as texts": b'{"prompt": 5, "answer": 1}\n',
    "null prompt": b'{"prompt": null, "answer": "1"}\n',
    "one null prompt": lines(GOOD, {"prompt": None, "answer": "1"}),
    "boolean": lines({"prompt": "a", "answer": True}),
    "answers": lines({"prompt": "a", "answer": ["1", "2"]}),
    "mapping": lines({"prompt": "a", "answer": {"x": 1}}),
    "empty texts": lines({"prompt": "", "answer": ""}),
    "mixed types": lines(GOOD, {"prompt": ["a"], "answer": 1}),
    "other columns": lines(GOOD, {"question": "b"}),
    "surrogate": b'{"prompt": "a\\ud800b", "answer": "1"}\n',
    "surrogate answer": b'{"prompt": "a", "answer": "\\udfff"}\n',
    "raw surrogate": b'{"prompt": "a\xed\xa0\x80b", "answer": "1"}\n',
    "NUL": b'{"prompt": "a\\u0000b", "answer": "1"}\n',
    "raw NUL": b'{"prompt": "a\0b", "answer": "1"}\n',
    "escape": b'{"prompt": "a\x1b[31mb", "answer": "1"}\n',
    "escape in a name": b'{"\\u001b]0;title\\u0007": "a"}\n',
    "Latin-1": b'{"prompt": "\xe9", "answer": "1"}\n',
    "BOM": b"\xef\xbb\xbf" + lines(GOOD),
    "UTF-16": lines(GOOD).decode().encode("utf-16"),
    "UTF-32": lines(GOOD).decode().encode("utf-32"),
    "100 deep": deep(100),
    "1000 deep": deep(1000),
    "100,000 deep": deep(100_000),
    "3000 objects deep": deep(3000, b'{"a":', b"}"),
    "deep as text": lines({"prompt": "[" * 5000 + "]" * 5000, "answer": "1"}),
    "10 MB prompt": lines({"prompt": "a" * 10_000_000, "answer": "1"}),
    "20 MB column": lines({"prompt": "hi", "answer": "1", "junk": "a" * 20_000_000}),
    "5000 columns": lines({**GOOD, **{f"c{i}": i for i in range(5000)}}),
    "names of ours": lines({**GOOD, "__class__": "x", "": "y", "a.b": 1, "ids": 3, "mask": 1}),
    "long answer": lines({"prompt": "a", "answer": "9" * 100_000}),
    "latex": lines({"prompt": "a", "answer": "\\frac{" * 500}),
    "power": lines({"prompt": "a", "answer": "9^9^9^9^9"}),
    "factorial": lines({"prompt": "a", "answer": "100000!!"}),
    "code": lines({"prompt": "a", "answer": "__import__('os').system('touch FLAG')"}),
    "special tokens": lines({"prompt": "<pad><eos></s><|im_end|>", "answer": "1"}),
    "template": lines({"prompt": "{{ 7*7 }}{% for x in range(999999999) %}{% endfor %}", "answer": "1"}),
    "no turns": turns(),
    "no role": turns({"content": "a"}),
    "null content": turns({"role": "user", "content": None}),
    "parts": turns({"role": "user", "content": [{"type": "text", "text": "a"}]}),
    "tool first": turns({"role": "tool", "content": "a"}),
    "assistant only": turns({"role": "assistant", "content": "a"}),
    "foreign role": turns({"role": "</s>evil\x1b[0m\n", "content": "a"}),
    "list as role": turns({"role": ["user"], "content": "a"}),
    "extra keys": turns({"role": "user", "content": "a", "x": {"y": 1}}),
    "calls": turns({"role": "assistant", "content": "", "tool_calls": 5}, {"role": "user", "content": "a"}),
    "null calls": turns({"role": "user", "content": "a", "tool_calls": [None]}),
    "nested turns": turns([{"role": "user", "content": "a"}]),
    "text as turns": lines({"messages": "hello", "answer": "1"}),
    "text beside turns": lines({"messages": [{"role": "user", "content": "a"}], "answer": "1"}, {"messages": "b"}),
    "null tools": lines({**GOOD, "tools": [None, 5]}),
}
CSV = {
    "empty": b"",
    "header": b"prompt,answer\n",
    "ragged": b"prompt,answer\na,1,2\nb\n",
    "open quote": b'prompt,answer\n"a,1\n',
    "repeated name": b"prompt,prompt\na,b\n",
    "nameless": b"prompt,answer,\na,1,2\n",
    "NUL": b"prompt,answer\na\0b,1\n",
    "long field": b"prompt,answer\n" + b"a" * 300_000 + b",1\n",
    "long name": b"prompt," + b"a" * 300_000 + b"\nx,1\n",
    "UTF-16": "prompt,answer\na,1\n".encode("utf-16"),
    "Latin-1": b"prompt,answer\n\xe9,1\n",
    "semicolons": b"prompt;answer\na;1\n",
    "blank first": b"\nprompt,answer\na,1\n",
    "escape": b"prompt,answer,\x1b[2Jx\na,1,x,y\n",
}
PARQUET = {
    "garbage": b"PAR1garbagePAR1",
    "empty": b"",
    "text": b"hello",
    "huge footer": b"PAR1" + bytes(100) + struct.pack("<I", 4_000_000_000) + b"PAR1",
    "no rows": parquet(prompt=[], answer=[]),
    "nulls": parquet(prompt=[None, None], answer=["1", "2"]),
    "bytes": parquet(prompt=[b"\xff\xfe", b"x"], answer=["1", "2"]),
    "numbers": parquet(prompt=[1, 2], answer=[1.5, float("nan")]),
}
OTHER = {
    "x.txt": b"hi",
    "x.jsonl.gz": b"\x1f\x8b",
    "plain": lines(GOOD),
    "UPPER.JSONL": lines(GOOD),
    "a[1].jsonl": lines(GOOD),
}
TRAPS = {
    **{f"{name}.jsonl": raw for name, raw in JSONL.items()},
    **{f"{name}.csv": raw for name, raw in CSV.items()},
    **{f"{name}.parquet": raw for name, raw in PARQUET.items()},
    **{f"{name}.json": JSONL[name] for name in ("one list", "null", "100,000 deep")},
    **OTHER,
}
CHAT = turns({"role": "system", "content": "s"}, {"role": "user", "content": "q"})
SOURCES = (
    ("jsonl", lines(GOOD, {"prompt": "b", "answer": "7"}, {"prompt": "c", "answer": "1/2"})),
    ("jsonl", CHAT),
    ("csv", b'prompt,answer,level\na,1,x\n"b,c",2,y\n'),
    ("parquet", parquet(prompt=["a", "b"], answer=["1", "2"])),
)
PIECES = (b"\\ud83d", b"\\u0000", b"null", b"{", b"]", b'"', b"\n", b"1e400", b"\xff", b"-", b"NaN", b"\x1b[2J")


def mutated(raw: bytes, draw: random.Random) -> bytes:
    """Return a file with some bytes replaced, inserted and removed."""
    for _ in range(draw.choice((1, 1, 2, 6))):
        at = draw.randrange(len(raw) or 1)
        removed = draw.choice((0, 0, 1, draw.randint(1, 9)))
        inserted = draw.choice((b"", draw.randbytes(1), draw.randbytes(draw.randint(1, 5)), draw.choice(PIECES)))
        raw = raw[:at] + inserted + raw[at + removed :]
    return raw


def run(folder: Path, count: int, seed: int) -> Counts:
    """Read `count` files: the traps in another order for each seed, then mutations of good files."""
    draw, counts = random.Random(seed), Counts()
    files = list(TRAPS.items())
    draw.shuffle(files)
    for i in range(count - len(files)):
        suffix, raw = draw.choice(SOURCES)
        files.append((f"{i}.{suffix}", mutated(raw, draw)))
    flag = folder / "FLAG"
    for name, raw in files[:count]:
        path = folder / name
        path.write_bytes(raw.replace(b"FLAG", str(flag).encode()))
        sizes = ["--limit", "2", "--max-new-tokens", "1"]
        outcome = run_command(["eval", "--model", "embedded:student", "--prompts", str(path), *sizes], SECONDS)
        path.unlink()
        fault = "its code ran" if flag.exists() else outcome.fault()
        flag.unlink(missing_ok=True)
        counts.add(f"{name}, {raw[:200]!r}: {outcome.output[-600:]}", fault, refused=outcome.code == 2)
    return counts
