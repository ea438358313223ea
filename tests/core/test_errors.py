"""Messages as a terminal shows them: one line, no control characters, nothing that floods the screen."""

import pytest

from opd.cli import main
from opd.core.errors import LONGEST_MESSAGE, printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("--out a b: is a file; name a folder", "--out a b: is a file; name a folder"),
        ("naïve 数学 🙂", "naïve 数学 🙂"),
        ("two\nlines\r\n  and\ttabs", "two lines and tabs"),
        ("\x1b]0;title\x07x", "\\x1b]0;title\\x07x"),
        ("\x9b2J\x7f\0", "\\x9b2J\\x7f\\x00"),
        ("a\u202eb\u2066c\u2028d", "a\\u202eb\\u2066c d"),
        ("half \ud800", "half \\ud800"),
    ],
)
def test_a_message_is_a_line(text, shown):
    assert printable(text) == shown
    shown.encode()


def test_a_long_message_keeps_its_flag_and_its_remedy():
    value = printable(f"--prompts {'x' * 5000}: no such file; correct the path")
    assert value.startswith("--prompts xxx") and value.endswith("correct the path") and len(value) < 400
    words = printable(f"--prompts {'x ' * 5000}: no such file; correct the path")
    assert words.startswith("--prompts x") and words.endswith("correct the path") and len(words) <= LONGEST_MESSAGE + 3


@pytest.mark.parametrize("word", ["\x1b]0;pwned\x07x", "a\nb", "y" * 5000])
def test_what_was_typed_does_not_reach_the_terminal(word, capsys):
    for arguments in ([word], ["report", word], ["eval", "--model", word, "--prompts", "embedded:ledger"]):
        assert main(arguments) == 2
        shown = capsys.readouterr().err
        assert shown.count("\n") == 1 and "\x1b" not in shown and "\x07" not in shown and len(shown) < 2000
