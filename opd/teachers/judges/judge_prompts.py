"""The user's prompts of a judge: `read_prompts(folder, embedded) -> prompts`, and `filled(prompt, values) -> text`."""

import re
from collections.abc import Mapping
from pathlib import Path

from opd.core.disk import nearest
from opd.core.errors import Refusal, foreign_errors, suggestion


def read_prompts(folder: str, embedded: Mapping[str, str]) -> dict[str, str]:
    """Return the prompts in the files NAME.txt of a folder, by name; those without a file stay as `embedded`.

    A prompt has the same places as the embedded one, such as {question}.  Raises Refusal for other names, and for a
    prompt without a place for the texts that the judge must read.
    """
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise Refusal(f"--judge-prompts {folder}: no such folder{nearest(path)}")
    prompts = {}
    for file in sorted(path.glob("*.txt")):
        if file.stem not in embedded:
            known = ", ".join(f"{name}.txt" for name in embedded)
            raise Refusal(
                f"--judge-prompts {file}: is no prompt of this method{suggestion(file.stem, embedded)}; it has {known}"
            )
        with foreign_errors(f"--judge-prompts {file}: cannot be read", "save it as UTF-8 text"):
            prompts[file.stem] = file.read_text(encoding="utf-8")
        texts = re.findall(r"^(\{\w+\})$", embedded[file.stem], re.MULTILINE)  # other places are for numbers
        if missing := [place for place in texts if place not in prompts[file.stem]]:
            raise Refusal(f"--judge-prompts {file}: has no {missing[0]}; write it where that text belongs")
    if not prompts:
        raise Refusal(f"--judge-prompts {folder}: holds none of {', '.join(f'{name}.txt' for name in embedded)}")
    return prompts


def filled(prompt: str, values: Mapping[str, object]) -> str:
    """Return a user's prompt with the values in their places; all other braces stay, so JSON needs no escapes."""
    return re.sub(rf"\{{({'|'.join(values)})\}}", lambda place: str(values[place[1]]), prompt)
