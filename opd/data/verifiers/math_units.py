r"""Numbers with units: `Quantity.of(r"5 \text{ km/h}")`, for text in the writing of `math_writing.latex`."""

import re
from dataclasses import dataclass

# Names of units, each with its other names; a plural s may follow.  Nothing is converted.
_UNITS = {
    "m": "meter metre", "km": "kilometer kilometre", "cm": "centimeter centimetre", "mm": "millimeter millimetre",
    "nm": "nanometer nanometre", "in": "inch inches", "ft": "foot feet", "yd": "yard", "mi": "mile",
    "g": "gram gm", "kg": "kilogram", "mg": "milligram", "lb": "pound", "oz": "ounce", "t": "ton tonne",
    "s": "second sec", "min": "minute", "h": "hour hr", "day": "", "week": "", "year": "yr", "month": "",
    "ms": "millisecond", "am": "", "pm": "", "l": "liter litre L", "ml": "milliliter millilitre mL", "gal": "gallon",
    "dollar": "USD $", "cent": "¢", "euro": "EUR €", "pound sterling": "GBP £", "yen": "JPY ¥", "rupee": "INR ₹",
    "degree": "deg", "radian": "rad", "C": "celsius", "F": "fahrenheit", "K": "kelvin", "N": "newton",
    "J": "joule", "kJ": "kilojoule", "W": "watt", "kW": "kilowatt", "MW": "megawatt", "mW": "milliwatt", "V": "volt",
    "A": "ampere amp", "Hz": "hertz", "Pa": "pascal", "kPa": "kilopascal", "mol": "mole", "eV": "electronvolt",
}  # fmt: skip
_NAMES = {name: unit for unit, others in _UNITS.items() for n in (unit, *others.split()) for name in (n, f"{n}s")}
_RATES = {"mph": "mi / h", "kph": "km / h", "kmh": "km / h", "kmph": "km / h", "mps": "m / s", "per": "/"}
_SCALES = {"dozen": 12, "hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_POWERS = {"square": "2", "sq": "2", "squared": "2", "cubic": "3", "cubed": "3"}
_VAGUE = {"unit", "the", "of", "a", "an", "exactly", "about", "approximately", "total", "in", "is", "are"}
_LETTERS = "mgshlLtNJWVKCFA"  # letters that are a unit if a space or a slash stands before them

TEXT = re.compile(r"\\(?:text|textbf|textit|textrm|mbox|mathrm|mathbf|mathit|operatorname)\s*\{([^{}]*)\}")
NUMERIC = re.compile(r"(?:[\d\s()+\-*/^{}.!,]|\\(?:frac|sqrt|pi|times|cdot)(?![a-z]))*")
_UPRIGHT_DIGITS = re.compile(r"\\[a-z]+\s*\{([\d\s().,+-]*)\}")
_PERCENT = re.compile(r"\s*(?:\\?%|\\text\s*\{\s*(?:\\?%|percent)\s*\}|percent)\s*")
_CURRENCY = re.compile(r"(-?\s*)\\?([$€£¥₹])(.*)", re.DOTALL)
_SCALE = re.compile(rf"\s*({'|'.join(_SCALES)})s?\b(.*)", re.DOTALL | re.IGNORECASE)
_UNIT_TEXT = re.compile(r"(?:\s|\\degree|[^\W\d_]|\^\s*(?:\{-?[1-6]\}|-?[1-6])|[$€£¥₹¢/.])*")
_WORD = re.compile(r"(?<!\\)\b([^\W\d_]+)")
_TOKEN = re.compile(r"(\\degree|[^\W\d_]+|[$€£¥₹¢/])(?:\s*\^\s*\{?(-?\d)\}?)?")


def is_word(letters: str) -> bool:
    """Return whether letters are a word, and not a product such as abc or xyz."""
    return (
        re.search("[aeiou]", letters, re.IGNORECASE) is not None and letters.lower() not in "abcdefghijklmnopqrstuvwxyz"
    )


@dataclass(frozen=True)
class Quantity:
    """A value with its unit: the names of units in order, and other words, such as apples."""

    value: str
    unit: tuple[str, ...] = ()
    words: frozenset[str] = frozenset()
    percent: bool = False

    @classmethod
    def of(cls, text: str) -> "Quantity":
        """Read a number with what stands behind it; other expressions have no unit."""
        text = TEXT.sub(lambda match: _UPRIGHT_DIGITS.sub(r"\1", match[0]), text).strip()
        if match := _CURRENCY.match(text):
            text = f"{match[1]}{match[3]} {match[2]}"
        number = NUMERIC.match(text)
        assert number is not None, "the pattern accepts the empty text"
        value = number[0].rstrip("^{( ")
        suffix = text[len(value) :]
        is_number = re.search(r"\d|\\pi", value) and all(value.count(a) == value.count(b) for a, b in ("{}", "()"))
        if is_number and (match := _SCALE.fullmatch(TEXT.sub(r" \1 ", suffix))):
            return cls.of(rf"({value}) \times {_SCALES[match[1].lower()]}{match[2]}")
        if is_number and _PERCENT.fullmatch(suffix):
            return cls(value, percent=True)
        if not is_number or not _is_unit_text(suffix):
            return cls(text)
        return cls(value, *_units(TEXT.sub(r" \1 ", suffix)))

    def agrees(self, other: "Quantity") -> bool:
        """Return whether the units are the same, or one of them is missing."""
        if not (self.unit or self.words) or not (other.unit or other.words):
            return True
        return self.unit == other.unit and (self.words <= other.words or other.words <= self.words)


def _is_unit_text(suffix: str) -> bool:
    """Return whether the text behind a number is a unit or a noun, and not a factor or a sentence with numbers."""
    bare = TEXT.sub(" ", suffix)
    visible_text = TEXT.sub(r" \1 ", suffix)
    if (
        not _UNIT_TEXT.fullmatch(bare)
        or not re.search(r"[^\W\d_]|[$€£¥₹¢]", visible_text)
        or re.search(r"\d\s*[a-z]", visible_text)
    ):
        return False
    return all(_is_unit(word[1], bare[: word.start()]) for word in _WORD.finditer(bare))


def _is_unit(word: str, preceding: str) -> bool:
    r"""Return whether a word outside of \text is a unit or a noun, and not a variable."""
    if len(word) == 1:
        return word in _LETTERS and (preceding[-1:] in (" ", "/") or preceding.endswith("degree"))
    return word in _NAMES or word.lower() in _RATES or (len(word) > 2 and is_word(word))


def _units(text: str) -> tuple[tuple[str, ...], frozenset[str]]:
    """Return the units in a text, in order, and its other words."""
    text = re.sub(r"\b([ap])\.\s?m\b\.?", r"\1m", text, flags=re.IGNORECASE)
    text = re.sub(r"\b\w+\b", lambda match: _RATES.get(match[0].lower(), match[0]), text)
    units, words, power = list[str](), set[str](), ""
    for token, exponent in _TOKEN.findall(text):
        word = token.removeprefix("\\")
        unit = "/" if word == "/" else _NAMES.get(word) or _NAMES.get(word.lower())
        if word.lower() in _POWERS:
            power = _POWERS[word.lower()]
            if units and word.lower().endswith("ed"):  # "meters squared"
                units[-1], power = units[-1] + power, ""
        elif unit:
            units.append(unit + (exponent or power))
            power = ""
        elif word.lower().rstrip("s") not in _VAGUE:
            words.add(word.lower().rstrip("s"))
    return tuple(units), frozenset(words)
