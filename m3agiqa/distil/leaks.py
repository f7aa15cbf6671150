"""Whether a description gives away the score that the teacher was shown.

A fine-tuned model is not shown the score: a description that states it teaches to guess. What also stands in the
image's own prompt is no leak.
"""

import re
from collections.abc import Iterator

from m3agiqa.aspects import RATING_WORDS

# fmt: off
_UNITS = [
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
]
_TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
# fmt: on
_WHOLE = {word: i for i, word in enumerate(_UNITS)} | {word: 10 * i for i, word in enumerate(_TENS, start=2)}
_WHOLE |= {f"{ten} {unit}": _WHOLE[ten] + _WHOLE[unit] for ten in _TENS for unit in _UNITS[1:10]}
_SPELLED = "|".join(re.escape(word).replace(r"\ ", "[ -]") for word in sorted(_WHOLE, key=len, reverse=True))

_DECIMAL = re.compile(r"(?:(?<![\d.,])(\d+)[.,]|(?<![\w.,])\.)(\d+)(?![\d]|[.,]\d)")
_DIGIT = "|".join(_UNITS[:10])
_POINT = re.compile(rf"\b({_SPELLED})\s+(?:point|dot|comma)\s+((?:{_DIGIT})(?:\s+(?:{_DIGIT}))*)\b")
_WHOLE_NUMBER = re.compile(r"(?<![\d.,])\d+(?![\d]|[.,]\d)")
_COUNTS = 11
_HALF = re.compile(rf"\b({_SPELLED}|\d+)\s+and\s+a\s+(half|quarter)\b")
_NUMBER = rf"(?:\d+(?:[.,]\d+)?|{_SPELLED})"
_WORD = rf"(?:{'|'.join(RATING_WORDS)})"
# What stands before a number below zero: a minus, hyphen or dash, which after a letter or digit joins or spans.
_MINUS = re.compile(r"(?:(?<!\w)[-‐‑‒–—−]|\b(?:minus|negative)\s)\s?$")
_ABOUT = (
    r"(?:(?:(?:just|only|perhaps|somewhere)\s+)?"
    r"(?:about|around|roughly|approximately|nearly|almost|near|close to)\s+(?:a\s+)?)"
)
# A number that no noun follows, which it would count.
_ALONE = (
    rf"[-−]?(?:\d{{1,3}}(?:[.,]\d+)?|{_SPELLED})\b(?![.,]\d)(?=\s*(?:$|[.;:!?)]|,(?!\s*\d)|"
    r"(?:but|overall|in all|because|since|due|though|although|given|despite|at best)\b))"
)
_NOUN = (
    r"(?:quality|correspondence|authenticity|image|picture|photo|artwork|rendering|result|verdict|impression|alignment|"
    r"realism|match|fidelity|it|this)"
)
_IS = r"(?::|=|\b(?:is|are|as|was|seems?|appears?|remains|feels|looks|(?:can|could|would|may|might|should) be)\b)"

# A number that is put as a mark, whatever its value.
_MARKS = [
    rf"(?<![\d/]){_NUMBER}\s*(?:/|\bout of\b)\s*(?:a\s+)?(?:possible\s+)?(?:5|10|100|five|ten|hundred)\b(?!/)",
    r"(?<![\d.,])\d+(?:[.,]\d+)?\s*(?:%|percent\b)",
    rf"\b{_NUMBER}[ -]stars? (?:rating|image|picture|quality|result)\b",
    rf"\b(?:gets?|earns?|deserves?|receives?|merits?|warrants?)\s+(?:a|an|about|around|roughly|only)?\s*{_NUMBER}\b",
    # Of the image, and not of what is counted in it.
    rf"(?:\b{_NOUN}|\b(?:that|which|all)|(?:^|[.,;:!?]))(?:\s+overall)?\s*\b"
    rf"(?:comes?|came|amounts?|adds? up|works? out|boils? down)\s+(?:to|at)\s+(?:{_ABOUT}|an?\s+)?{_ALONE}",
    rf"\b{_NOUN}\s+(?:lands?|sits?|stands?|settles?|hovers?|ranks?|falls?)\s+(?:at|on|around|near)\s+{_ABOUT}?{_ALONE}",
    rf"\b{_NOUN}(?:\s+overall)?\s*{_IS}\s*{_ABOUT}{_ALONE}",
    rf"(?:^|[.!?;]\s+)(?:overall|in sum|in short|all in all)?,?\s*(?:it is|it's|this is)?\s*{_ABOUT}{_ALONE}(?!,)",
]
# That somebody has rated the image.
_MENTIONS = [
    r"\b(?:score|scores|scored|scoring|rating|ratings|rated|rate|mos|mean opinion|raters?|annotators?|evaluators?|"
    r"participants|respondents|ground[ -]truth)\b",
    r"\b(?:human|people's|viewers'|average|given|provided|assigned|stated) (?:judge?ments?|evaluations?|opinions?)\b",
    r"\bon (?:a|the) scale\b",
    r"\b(?:many |most )?(?:people|viewers|observers) (?:have )?(?:judged|found|considered|deemed)\b",
]
_FILLERS = r"(?:(?:a|an|the|overall|very|quite|rather|fairly|only|just|merely|generally|relatively|at best|simply)\s+)*"
_SEEN = (
    r"(?:(?:considered|described|judged|deemed|called|regarded|classified|labell?ed|seen|summed up)\s+"
    r"(?:as\s+|to be\s+)?)?"
)
_ENDS = (
    r"(?=\s*(?:$|[.,;:!?)–—-]|(?:and|but|with|overall|because|since|due|though|although|given|despite|at best|"
    r"in (?:terms|general))\b))"
)
# A rating word that sums up, as against one that describes a part ("good lighting", "fair skin").
_VERDICTS = [
    rf"\b{_NOUN}(?:\s+of\s+(?:the|this)\s+\w+)?(?:\s+overall)?\s*{_IS}\s*{_SEEN}{_FILLERS}{_WORD}\b{_ENDS}",
    rf"\b{_WORD}[ -](?:(?:overall|visual|image|technical|general|perceptual)\s+)*"
    r"(?:quality|correspondence|authenticity|alignment|verdict|grade)\b",
    rf"\b(?:is|as) an?\s+{_FILLERS}{_WORD} "
    r"(?:image|picture|photo|result|rendering|illustration|match|representation)\b",
    rf"(?<!\w)[\"'“‘*]+{_WORD}[\"'”’*]+",
    r"\b(?:judged?|deemed|graded?|classified|considered|called|labell?ed)\s+"
    rf"(?:as\s+|to be\s+|it\s+)?{_FILLERS}{_WORD}\b",
    r"(?:^|[.!?;:]\s+)(?:overall|in sum|in short|in summary|all in all)?,?\s*(?:it is|it's|this is)?\s*"
    rf"{_FILLERS}{_WORD}\s*(?:[.!]|$)",
]
_PATTERNS = [
    (kind, re.compile(pattern))
    for kind, patterns in (
        ("gives a mark", _MARKS),
        ("mentions a rating", _MENTIONS),
        ("gives a verdict", _VERDICTS),
    )
    for pattern in patterns
]


def find_leak(description: str, score: float | None, prompt: str | None = None) -> str | None:
    """What gives the score away, as `states the score ('3.4')`; None where nothing does.

    Args:
        score: the human score that the teacher was shown, on whatever scale; None: it was shown none. What is found is
            told to the teacher, who would learn a score from a number that comes near it by chance.
        prompt: what the image was made from.
    """
    text, own = description.lower(), " ".join((prompt or "").lower().split())
    stated = None if score is None else _stated(text, score, own)
    if stated is not None:
        return f"states the score ({stated!r})"
    for kind, pattern in _PATTERNS:
        for match in pattern.finditer(text):
            found = match.group().strip(" .,;:!?")
            if found not in own:
                return f"{kind} ({found!r})"
    return None


def _stated(text: str, score: float, own: str) -> str | None:
    """The first number that is the score, unless it stands in the image's `own` prompt."""
    for found, value in _numbers(text):
        # As far as rounding to one decimal, or cutting it off, can take it away from the score.
        if abs(value - score) < 0.1 and found not in own:
            return found
    # Of a scale of few steps a whole number says little, and is as likely to count things.
    whole = {str(int(score)), str(round(score))}
    for match in _WHOLE_NUMBER.finditer(text) if score >= _COUNTS else ():
        if match.group() in whole and match.group() not in own:
            return match.group()
    return None


def _numbers(text: str) -> Iterator[tuple[str, float]]:
    """Numbers that are not whole, however they are written, with their values. Whole ones count things."""
    for match in _DECIMAL.finditer(text):
        yield from _signed(text, match, float(f"{match.group(1) or 0}.{match.group(2)}"))
    for match in _POINT.finditer(text):
        digits = "".join(str(_UNITS.index(word)) for word in match.group(2).split())
        yield from _signed(text, match, float(f"{_WHOLE[match.group(1).replace('-', ' ')]}.{digits}"))
    for match in _HALF.finditer(text):
        whole = match.group(1)
        value = int(whole) if whole.isdigit() else _WHOLE[whole.replace("-", " ")]
        yield from _signed(text, match, value + (0.5 if match.group(2) == "half" else 0.25))


def _signed(text: str, match: re.Match[str], value: float) -> Iterator[tuple[str, float]]:
    """A number; with what may be a minus before it, which may be a dash as well, also the one below zero."""
    yield match.group(), value
    if (minus := _MINUS.search(text, 0, match.start())) is not None:
        yield text[minus.start() : match.end()], -value
