"""Mistakes of the user: `Refusal`, one line that says what is wrong and what to do, and checks that raise it."""


class Refusal(ValueError):
    """An error that the user can mend: one line that names the flag, the value, the reason and the remedy."""


def positive(settings: object, *names: str) -> None:
    """Refuse those of some settings that are not above 0."""
    for name in names:
        if not getattr(settings, name) > 0:
            raise Refusal(f"--{name.replace('_', '-')} {getattr(settings, name)}: must be above 0")


def at_least(settings: object, **least: int) -> None:
    """Refuse settings below the least that each may be."""
    for name, bound in least.items():
        if not getattr(settings, name) >= bound:
            raise Refusal(f"--{name.replace('_', '-')} {getattr(settings, name)}: must be at least {bound}")


def one_line(said: object) -> str:
    """Return the text of a server's answer or of an error as one line, cut to 200 characters."""
    text = " ".join(str(said).split())
    return text if len(text) <= 200 else text[:197] + "..."
