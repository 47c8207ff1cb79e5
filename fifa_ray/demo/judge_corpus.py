"""Labelled prompts that teach a very small language model the rubric of `scoring/quality.py`.

Hand-written word lists and templates, put together at random. They share no template with the demo
world's prompts and none of its objects, and hold no text of any dataset, so what the judge does on
those is generalisation. Harmful phrases are plain and short: enough to name what a category means.
"""

import random
import string
from collections.abc import Callable
from importlib import resources
from typing import Any, NamedTuple

import yaml


class LabelledPrompt(NamedTuple):
    """A prompt with the two answers that the rubric asks for."""

    text: str
    harm: str
    quality: int


_PHRASES: dict[str, Any] = yaml.safe_load(
    (resources.files("fifa_ray.demo") / "weights/judge/corpus.yaml").read_text()
)

SHARES = {
    "normal": 0.34, "dark": 0.06, "vague": 0.09, "junk": 0.17, "contradictory": 0.05,
    "harmful": 0.24, "language": 0.05,
}  # fmt: skip
INJECTED_SHARE = 0.12


def judge_corpus(num_prompts: int, seed: int) -> list[LabelledPrompt]:
    """`num_prompts` labelled prompts, in the proportions of `SHARES`; the same for a seed."""
    rng = random.Random(seed)
    makers: dict[str, Callable[[random.Random], LabelledPrompt]] = {
        "normal": _normal, "dark": _dark, "vague": _vague, "junk": _junk,
        "contradictory": _contradictory, "harmful": _harmful, "language": _language,
    }  # fmt: skip
    kinds = rng.choices(list(SHARES), list(SHARES.values()), k=num_prompts)
    return [_vary(makers[kind](rng), rng) for kind in kinds]


def _article(phrase: str) -> str:
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def _scene(rng: random.Random) -> tuple[str, int]:
    """A drawable phrase and how many particulars it states beyond its subject."""
    subject, particulars = (
        rng.choice(_PHRASES["things"] if rng.random() < 0.5 else _PHRASES["beings"]),
        0,
    )
    if rng.random() < 0.4:
        subject, particulars = f"{rng.choice(_PHRASES['looks'])} {subject}", particulars + 1
    text = (
        f"{rng.choice(_PHRASES['counts'])} {subject}s" if rng.random() < 0.15 else _article(subject)
    )
    if rng.random() < 0.35:
        text, particulars = f"{text} {rng.choice(_PHRASES['actions'])}", particulars + 1
    elif rng.random() < 0.5:
        other = rng.choice(_PHRASES["things"] + _PHRASES["beings"])
        other = f"{rng.choice(_PHRASES['looks'])} {other}" if rng.random() < 0.5 else other
        text, particulars = (
            f"{text} {rng.choice(_PHRASES['between'])} {_article(other)}",
            particulars + 1,
        )
    if rng.random() < 0.5:
        place = rng.choice(_PHRASES["places"])
        text = f"{place}, {text}" if rng.random() < 0.15 else f"{text} {place}"
        particulars += 1
    return text, particulars


def _normal(rng: random.Random) -> LabelledPrompt:
    text, particulars = _scene(rng)
    if rng.random() < 0.4:
        style = rng.choice(_PHRASES["styles"])
        way = rng.choice(
            ("{s} of {t}", "{t}, {s}", "{t} in the style of {s}", "{t}. {s}", "{s}: {t}")
        )
        text, particulars = way.format(s=style, t=text), particulars + 1
    if rng.random() < 0.45:
        details = rng.sample(_PHRASES["details"], rng.randint(1, 5))
        text, particulars = ", ".join([text, *details]), particulars + 1
    return LabelledPrompt(text, "none", min(9, 6 + particulars))


def _dark(rng: random.Random) -> LabelledPrompt:
    text = rng.choice(_PHRASES["harmless_but_dark"])
    if rng.random() < 0.5:
        return LabelledPrompt(
            f"{text}, {rng.choice(_PHRASES['styles'] + _PHRASES['details'])}", "none", 9
        )
    return LabelledPrompt(text, "none", 8)


def _vague(rng: random.Random) -> LabelledPrompt:
    first, second = rng.sample(_PHRASES["vague_words"], 2)
    return LabelledPrompt(rng.choice(_PHRASES["vague"]).format(a=first, b=second), "none", 2)


def _contradictory(rng: random.Random) -> LabelledPrompt:
    text = rng.choice(_PHRASES["contradictory"]).format(
        t=rng.choice(_PHRASES["things"]),
        p=rng.choice(_PHRASES["places"]),
        b=rng.choice(_PHRASES["beings"]),
        l=rng.choice(_PHRASES["looks"]),
    )
    return LabelledPrompt(text, "none", 3)


def _language(rng: random.Random) -> LabelledPrompt:
    return rng.choice(_PHRASES["other_languages"])


def _harmful(rng: random.Random) -> LabelledPrompt:
    category = rng.choice(list(_PHRASES["harm"]))
    who, what = (rng.choice(part) for part in _PHRASES["harm"][category])
    text, quality = rng.choice((f"{who} {what}", f"{who} {what}", what)), 6
    if rng.random() < 0.35:  # most of the prompt is an ordinary picture
        scene, _ = _scene(rng)
        way = rng.choice(
            (
                "{x}, {y}",
                "{y}, {x}",
                "{x} next to {y}",
                "{y} and {x}",
                "{x}. {y}",
                "{y} watching {x}",
            )
        )
        text = way.format(x=text, y=scene)
    if rng.random() < 0.35:
        text = rng.choice(("{s} of {t}", "{t}, {s}")).format(
            s=rng.choice(_PHRASES["styles"]), t=text
        )
    if rng.random() < 0.3:
        text = ", ".join([text, *rng.sample(_PHRASES["details"], rng.randint(1, 4))])
    return LabelledPrompt(text, category, quality)


def _junk(rng: random.Random) -> LabelledPrompt:
    makers = (
        _mash,
        _mash,
        _repeat,
        _salad,
        _code,
        _link,
        _advert,
        _style_words,
        _style_words,
        _symbols,
    )
    return LabelledPrompt(rng.choice(makers)(rng), "none", 0)


def _letters(
    rng: random.Random, low: int, high: int, alphabet: str = string.ascii_lowercase
) -> str:
    return "".join(rng.choices(alphabet, k=rng.randint(low, high)))


def _mash(rng: random.Random) -> str:
    alphabet = rng.choice(
        (string.ascii_lowercase, string.ascii_letters, "sdfghjk", "qwerty", "hjklm,;", "aeiouxz")
    )
    return " ".join(_letters(rng, 2, 11, alphabet) for _ in range(rng.randint(1, 6)))


def _repeat(rng: random.Random) -> str:
    unit = rng.choice(
        (_letters(rng, 1, 2), "test", "la", "word", "blah", "hello", "na", "copy", "ok")
    )
    return rng.choice(("", " ", ", ")).join([unit] * rng.randint(4, 14))


def _salad(rng: random.Random) -> str:
    fillers = (
        "the", "of", "under", "why", "17", "null", "because", "very", "undefined", "it", "[PAD]",
        "</p>", "was", "%d", "\\t", "NaN", "at", "un-", "ing",
    )  # fmt: skip
    return " ".join(
        rng.choices([*fillers, *(_letters(rng, 1, 5) for _ in range(6))], k=rng.randint(4, 12))
    )


def _code(rng: random.Random) -> str:
    a, b, n = _letters(rng, 2, 7), _letters(rng, 2, 7), rng.randint(0, 999)
    return rng.choice((
        f"def {a}({b}): return {b} + {n}", f"<p id='{a}'>{b}</p>", f'{{"{a}": {n}, "{b}": null}}',
        f"import {a} from '{b}'", f"DROP TABLE {a};",
        f"error {n}: {a} is not defined at line {n // 7}",
        f".{a} {{ margin: {n}px; }}", f"/{a} --{b} {n}", f"{a}_{b}_{n}.png", f"git commit -m '{a}'",
        f"<img src='{a}.jpg'/>", f"#{a} #{b} #{_letters(rng, 3, 6)}", f"{a}={n}&{b}=true",
    ))  # fmt: skip


def _link(rng: random.Random) -> str:
    host, path = _letters(rng, 3, 9), _letters(rng, 2, 8)
    return rng.choice((
        f"www.{host}.invalid", f"https://{host}.invalid/{path}", f"ftp://{host}.invalid/{path}.zip",
        f"{path}@{host}.invalid", f"see https://{host}.invalid/{path}?page={rng.randint(1, 99)}",
        f"C:\\{host}\\{path}.exe", f"http://{host}.invalid/{path}#{rng.randint(100, 999)}",
    ))  # fmt: skip


def _advert(rng: random.Random) -> str:
    what = rng.choice(
        ("shoes", "viagra", "insurance", "bitcoin", "diet tea", "phones", "casino bonus", "likes")
    )
    site, n = _letters(rng, 4, 9), rng.randint(2, 95)
    return rng.choice((
        f"best {what} online!!! order today at {site}.invalid",
        f"{n}% discount on {what}, limited offer",
        f"make money fast with {what} call {rng.randint(10**6, 10**7)}",
        f"SUBSCRIBE and win free {what}",
        f"{what} for sale, cheap {what}, buy {what}", f"visit {site}.invalid for {what} deals ${n}",
        f"follow @{site} for {what} giveaways", f"you have won {n}000 {what}!!! claim your prize",
    ))  # fmt: skip


def _style_words(rng: random.Random) -> str:
    words = (
        "4k", "8k", "hd", "best quality", "masterpiece", "sharp", "detailed", "cinematic",
        "trending", "render", "photorealistic", "hdr", "ultra", "high resolution",
        "professional", "award", "lighting", "wallpaper", "stunning", "hyperdetailed",
        "dslr", "intricate", "unreal engine", "smooth", "realistic", "bloom",
        "film grain",
    )  # fmt: skip
    return rng.choice((", ", " ", ",")).join(rng.sample(words, rng.randint(3, 11)))


def _symbols(rng: random.Random) -> str:
    kind = rng.random()
    if kind < 0.4:
        return _letters(rng, 1, 12, "!?.,-_#*/\\|+=~^&%$@:;()0123456789")
    if kind < 0.6:
        return " ".join(str(rng.randint(0, 99999)) for _ in range(rng.randint(1, 7)))
    if kind < 0.8:
        return rng.choice("?!.-_*#,;:/0123456789abcdfghz") * rng.randint(1, 7)
    return rng.choice(
        (
            "lorem ipsum dolor sit amet",
            "n/a",
            "null",
            "none",
            "tbd",
            "asdf",
            "foo bar baz",
            "prompt",
        )
    )


def _vary(labelled: LabelledPrompt, rng: random.Random) -> LabelledPrompt:
    """How people type: capitals, typos, a full stop; and some tell the judge what to answer."""
    text, harm, quality = labelled
    if rng.random() < 0.2:
        text = rng.choice((str.upper, str.capitalize, str.title))(text)
    if rng.random() < 0.15:
        text += rng.choice((".", "!", " please", " :)", "...", " thanks"))
    if rng.random() < 0.15 and len(text) > 8:
        at = rng.randrange(1, len(text) - 1)
        text = text[:at] + text[at + 1] + text[at] + text[at + 2 :]
    if rng.random() < INJECTED_SHARE:
        text, quality = rng.choice(_PHRASES["injections"]).format(x=text), max(0, quality - 3)
    return LabelledPrompt(text, harm, quality)
