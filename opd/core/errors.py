"""The error `Refusal`, a line that tells the user what is wrong and what to do, and checks that raise it."""


class Refusal(ValueError):
    """An error that the user can fix: a line that names the flag, the value, the reason and the remedy."""


def positive(settings: object, *names: str) -> None:
    """Refuse settings that are not above 0."""
    for name in names:
        if not getattr(settings, name) > 0:
            raise Refusal(f"--{name.replace('_', '-')} {getattr(settings, name)}: must be above 0")


def at_least(settings: object, **bounds: int) -> None:
    """Refuse settings below their lower bounds."""
    for name, bound in bounds.items():
        if not getattr(settings, name) >= bound:
            raise Refusal(f"--{name.replace('_', '-')} {getattr(settings, name)}: must be at least {bound}")


def one_line(message: object, limit: int = 200) -> str:
    """Return a message as one line of at most `limit` characters."""
    text = " ".join(str(message).split())
    return text if len(text) <= limit else text[: limit - 3] + "..."
