"""The writing systems of languages: which one a language is written in, and which one a text is."""

from __future__ import annotations

import collections
import functools
import unicodedata

import langcodes
import regex

COMPOSITE = {"Hans": ("Han",), "Hant": ("Han",), "Jpan": ("Han", "Hiragana", "Katakana"), "Kore": ("Hangul", "Han")}
POOL = "all"  # a corpus of several languages; the code is that of a language of India too
LOOKED_AT = 500  # characters of a text
OWN = 1 / 3  # share of a text's letters; a Han character stands for several Latin ones


@functools.cache
def scripts(lang: str) -> tuple[str, ...]:
    """The Unicode scripts that a language is usually written in (CLDR's likely one); none for what is no language."""
    try:
        tag = langcodes.Language.get(lang)
    except langcodes.LanguageTagError:
        return ()
    if lang == POOL or not tag.is_valid():
        return ()
    script = tag.maximize().script
    return COMPOSITE.get(script, (script,))


def in_script(text: str, lang: str) -> bool:
    """Whether OWN of the letters of a text are of its language's script; True where the language or the letters are none."""
    own, other = _patterns(scripts(lang))
    if own is None:
        return True
    text = text[:LOOKED_AT]
    ours = sum(map(len, own.findall(text)))
    return ours >= OWN * len(text) or ours >= OWN * (ours + sum(map(len, other.findall(text))))


def main_script(text: str) -> str:
    """The script of most letters of a text, by the first word of their Unicode names, such as Latin, Cyrillic, CJK."""
    names = (unicodedata.name(c, "unknown").split()[0] for c in text[:LOOKED_AT] if c.isalpha())
    (name, _), *_ = collections.Counter(names).most_common(1) or [("none", 0)]
    return name if name in ("CJK", "none", "unknown") else name.capitalize()


@functools.cache
def _patterns(names: tuple[str, ...]) -> tuple[regex.Pattern | None, regex.Pattern | None]:
    if not names:
        return None, None
    ours = "".join(rf"\p{{Script={name}}}" for name in names)
    return regex.compile(rf"[{ours}]+"), regex.compile(rf"[\p{{L}}--[{ours}]]+", regex.V1)
