"""From a message to the tokens of the request language: names, phrases, numbers with units, slips of the pen."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from lark import Token

from composer.chat.lexicon import NUMBERS, UNITS, phrases
from composer.chat.names import matching, parts
from composer.chat.words import Word, misspelt, words_of

NAMED = frozenset({"NAME", "GROUP", "ALL", "SOME", "SIZED", "DOUBTFUL", "WORD", "PATH"})
"""Tokens that may stand in a list of models or tasks."""
LIMITS = frozenset({"UNDER", "OVER", "SIZE", "TIME", "MEMORY", "DISK", "NUMBER", "VAGUE", "LIMIT", "PACE"})
_YIELDING = frozenset({"VAGUE", "PACE", "SPLIT"})
"""Phrases that give way to a model of that name."""
_LONGEST = max(map(len, phrases()))


@dataclass
class Scan:
    """The tokens of a message, and what was made of its words on the way."""

    tokens: list[Token] = field(default_factory=list)
    corrected: dict[str, str] = field(default_factory=dict)
    """Words with slips of the pen, and what they were taken for."""


def scan(text: str, known: Sequence[str]) -> Scan:
    """Turn a cleaned message into tokens.

    Args:
        text: From `words.clean`.
        known: Names of models and tasks.
    """
    scanned = Scan()
    words = words_of(text)
    place = 0
    while place < len(words):
        tokens, taken = _next(words, place, known, scanned)
        place += taken
        for token in tokens:
            if token.type == "ROUTE":  # what follows is a prompt, not a request
                scanned.tokens += [token, *_prompt(text, words[place:])]
                return _finish(scanned)
            scanned.tokens.append(token)
            if token.type == "CALL" and (name := _after(words, place)) is not None:
                scanned.tokens.append(Token("WORD", words[name].text))
                place = name + 1
    return _finish(scanned)


def _next(words: list[Word], place: int, known: Sequence[str], scanned: Scan) -> tuple[list[Token], int]:
    """Return the tokens of the next words, and how many words they are."""
    word = words[place]
    if word.kind == "mark":
        kind = {",": "_COMMA", "&": "_AND", "(": "_NOISE", ")": "_NOISE"}.get(word.text, "_SEP")
        return [Token(kind, word.text)], 1
    if word.kind == "quoted":
        inner = word.text[1:-1].strip()
        exact = [name for name in known if name.lower() == inner.lower()]
        return [Token("NAME", exact[0]) if exact else Token("QUOTED", inner)], 1
    if word.kind == "path":
        return [Token("PATH", word.text)], 1
    number = _number(words, place)
    if number is not None:
        return number
    return _phrase(words, place, known) or _name(words, place, known) or ([_slip(word, known, scanned)], 1)


def _number(words: list[Word], place: int) -> tuple[list[Token], int] | None:
    text = words[place].plain.replace(",", "")
    digits = text.rstrip("abcdefghijklmnopqrstuvwxyz% ")
    unit = text[len(digits) :].strip()
    if digits.replace(".", "", 1).isdigit():
        value = float(digits)
    elif text in NUMBERS:
        value, unit = float(NUMBERS[text]), ""
    else:
        return None
    taken = 1
    if not unit and place + 1 < len(words) and (words[place + 1].plain in UNITS):
        unit, taken = words[place + 1].plain, 2
    if not unit:
        return [_valued("NUMBER", text, value)], 1
    if unit not in UNITS:
        return None
    kind, scale = UNITS[unit]
    if kind == "MEMORY":
        rest = {one.plain for one in words[place + taken : place + taken + 3]}
        kind = "DISK" if rest & {"disk", "storage", "space"} else "MEMORY"
        while place + taken < len(words) and words[place + taken].plain in ("of", "ram", "disk", "storage", "space"):
            taken += 1
    return [_valued(kind, text, value * scale)], taken


def _valued(kind: str, text: str, value: float) -> Token:
    token = Token(kind, text)
    token.value = round(value, 9)
    return token


def _phrase(words: list[Word], place: int, known: Sequence[str]) -> tuple[list[Token], int] | None:
    """Return the longest phrase that begins here."""
    table = phrases()
    for count in range(min(_LONGEST, len(words) - place), 0, -1):
        said = tuple(word.plain for word in words[place : place + count])
        if said not in table or any(word.kind not in ("word", "number") for word in words[place : place + count]):
            continue
        kind, value = table[said]
        if count == 1 and kind in _YIELDING and any(said[0] in parts(name) for name in known):
            continue
        token = Token(kind, " ".join(word.text for word in words[place : place + count]))
        token.value = float(value) if kind in ("TIME", "SIZE", "TIMES") else value
        return [token], count
    return None


def _name(words: list[Word], place: int, known: Sequence[str]) -> tuple[list[Token], int] | None:
    """Return a name, perhaps of several words ("stories web"), if it is spelt as it should be."""
    for count in (3, 2, 1):
        run = words[place : place + count]
        if len(run) < count or any(word.kind not in ("word", "number") for word in run):
            continue
        said = " ".join(word.plain for word in run)
        found = [name for name in matching(said, known) if _spelt(said, name)]
        if found and (count == 1 or len({tuple(parts(one)) for one in found}) == 1):
            return [Token("NAME", said)], count
    return None


def _spelt(said: str, name: str) -> bool:
    return all(
        any(part == one or part.startswith(one) or one.startswith(part) for part in parts(name)) for one in parts(said)
    )


def _slip(word: Word, known: Sequence[str], scanned: Scan) -> Token:
    """Return what a word with a slip of the pen was meant to be: the nearest word known, a name before a keyword."""
    candidates: list[tuple[int, int, str, Token]] = []
    for part in {part for name in known for part in (*parts(name), name.lower())}:
        found = misspelt(word.plain, part)
        if found is not None:
            candidates.append((found, 0, part, Token("NAME", part)))
    for said, (kind, value) in phrases().items():
        found = misspelt(word.plain, said[0]) if len(said) == 1 and len(said[0]) >= 3 else None
        if found is not None:
            token = Token(kind, said[0])
            token.value = value
            candidates.append((found, 1, said[0], token))
    if not candidates:
        return Token("WORD", word.text)
    _, _, meant, token = min(candidates, key=lambda one: one[:3])
    scanned.corrected[word.text] = meant
    return token


def _prompt(text: str, words: list[Word]) -> list[Token]:
    """Return the prompt of "which expert would answer …": what stands in quotation marks, else all the rest."""
    quoted = [word.text[1:-1] for word in words if word.kind == "quoted"]
    while words and words[0].text in (":", ","):
        words = words[1:]
    said = quoted[0] if quoted else text[words[0].at :] if words else ""
    return [Token("QUOTED", said.strip())] if said.strip() else []


def _after(words: list[Word], place: int) -> int | None:
    """Return the place of the next word that says something: the name in "call it parrot"."""
    for index in range(place, len(words)):
        if words[index].kind != "mark" and words[index].plain not in (
            "it",
            "the",
            "this",
            "that",
            "result",
            "composite",
            "to",
            "thing",
            "whole",
            "model",
        ):
            return index
    return None


def _finish(scanned: Scan) -> Scan:
    tokens = [token for token in scanned.tokens if token.type != "_NOISE"]
    for step in (_nots, _nouns, _heads, _connectives, _predicates):
        tokens = step(tokens)
    scanned.tokens = tokens
    return scanned


def _as(token: Token, kind: str) -> Token:
    changed = Token(kind, str(token))
    changed.value = getattr(token, "value", str(token))
    return changed


_DENIED = {
    "MERGE": "NOMERGE", "SERVE": "UNSERVE", "DROP": "HOLD", "OUT": "ADD", "RUN": "CANCEL", "KEEP": "OUT", "USE": "OUT",
    "ADD": "OUT", "OVER": "UNDER",
}  # fmt: skip
"""What "not" makes of the next word."""


def _nots(tokens: list[Token]) -> list[Token]:
    """Turn "not" and a verb into one token, and tell apart what drops from what is dropped."""
    done: list[Token] = []
    guarded = False
    for token in tokens:
        guarded = token.type == "PROTECT" or (guarded and token.type not in ("_SEP",))
        if done and done[-1].type == "NOT" and token.type == "MUST":
            continue  # "should not be merged"
        if done and done[-1].type == "NOT" and token.type in _DENIED:
            done[-1] = _as(token, _DENIED[token.type])
        elif token.type == "DROP":
            bare = str(token).lower() in ("drop", "lose")
            done.append(_as(token, "HOLD" if guarded or not bare else "OUT"))
        else:
            done.append(token)
    return done


def _nouns(tokens: list[Token]) -> list[Token]:
    """Join words to what they say of models: "all stories models" is a group, "the best ones" is in doubt."""
    done: list[Token] = []
    for place, token in enumerate(tokens):
        before = done[-1] if done else None
        kind = before.type if before is not None else ""
        after = tokens[place + 1].type if place + 1 < len(tokens) else ""
        if token.type == "PLURAL":
            joined = {"NAME": "GROUP", "SIZE": "SIZED", "VAGUE": "DOUBTFUL", "PACE": "DOUBTFUL", "NUMBER": "SOME"}
            if kind in joined:
                done[-1] = _as(done[-1], joined[kind])
        elif token.type == "SINGULAR":
            if kind in ("VAGUE", "PACE"):
                done[-1] = _as(done[-1], "DOUBTFUL")
            elif kind == "SIZE":
                done[-1] = _as(done[-1], "SIZED")
        elif token.type == "NAME" and kind in ("ALL", "NUMBER", "SOME") and (kind == "ALL" or after == "PLURAL"):
            done[-1] = _as(token, "GROUP" if kind != "SOME" else "SOME")
        elif token.type == "ROUTER" and kind == "METHOD":
            done[-1:] = [_as(done[-1], "KIND"), token]
        elif kind == "VAGUE" and token.type in ("KIND", "METHOD", "NAME", "ROUTER"):
            done[-1] = token  # "a small MLP", "the good old slerp"
        else:
            done.append(token)
    return [
        _as(one, "VAGUE")
        if one.type == "PACE" and (place + 1 == len(done) or done[place + 1].type not in ("ROUTER", "KIND"))
        else one
        for place, one in enumerate(done)
    ]


def _heads(tokens: list[Token]) -> list[Token]:
    """Drop verbs that only lead to something else: "keep it under", "use at most", "with ties"."""
    done: list[Token] = []
    verb = ""
    for place, token in enumerate(tokens):
        after = tokens[place + 1].type if place + 1 < len(tokens) else ""
        if token.type == "KEEP" and (after in LIMITS or after in ("HOLD", "ALWAYS")):
            continue
        if token.type == "ONLY" and after not in NAMED | {"EVALUATE"}:
            continue
        if token.type not in NAMED | {"ALSO", "_AND", "_COMMA"}:
            verb = token.type
        if token.type == "ALSO" and after != "EVALUATE" and verb != "EVALUATE":
            continue
        if token.type == "NO":  # "no scrambled" leaves it out; "no, 25 trials" says nothing
            done += [_as(token, "OUT")] if after in NAMED else []
            continue
        if token.type in ("USE", "ADD") and after not in NAMED | {"ONLY"}:
            continue
        done.append(token)
    return done


def _connectives(tokens: list[Token]) -> list[Token]:
    """Tell the "and" of a list (AND) from what stands between two wishes (SEP)."""
    done: list[Token] = []
    verb = ""
    place = 0
    while place < len(tokens):
        token = tokens[place]
        if token.type in ("_AND", "_COMMA", "_SEP"):
            kinds = set()
            while place < len(tokens) and tokens[place].type in ("_AND", "_COMMA", "_SEP"):
                kinds.add(tokens[place].type)
                place += 1
            after = tokens[place].type if place < len(tokens) else ""
            before = done[-1].type if done else ""
            listed = (before in NAMED and after in NAMED) or (before == after == "METHOD")
            listed = listed and "_SEP" not in kinds
            if not listed:
                verb = ""
            done.append(Token("AND" if listed else "SEP", "," if "_COMMA" in kinds else str(token)))
            continue
        if token.type == "USE" and done and done[-1].type in NAMED and verb in ("MERGE", "COMPARE"):
            done.append(Token("AND", str(token)))  # "fuse math with science"
        else:
            verb = token.type if token.type not in NAMED | {"NOT", "MUST"} else verb
            done.append(token)
        place += 1
    return done


def _predicates(tokens: list[Token]) -> list[Token]:
    """Mark what something is said of ("math and law must not drop"), and drop the auxiliary verbs."""
    done: list[Token] = []
    for place, token in enumerate(tokens):
        before = tokens[place - 1].type if place else ""
        if token.type == "PREFER" and before in NAMED | {"MUST"} and str(token).lower() in ("count", "weigh", "weight"):
            token = _as(token, "MATTER")  # "web should count double"
        said = (
            token.type in ("HOLD", "STAY", "UNGUARD")
            or (token.type == "ALIKE" and before in NAMED)
            or (before == "MUST" and token.type in ("OUT", "WHOLE"))
        )
        said = said or (before in NAMED and token.type == "NOMERGE")
        after = tokens[place + 1].type if place + 1 < len(tokens) else ""
        said = said or (token.type == "MATTER" and before != "TIMES") or (token.type == "TIMES" and after == "MATTER")
        if said:
            _mark(done)
        done.append(token)
    return [token for token in done if token.type != "MUST"]


def _mark(done: list[Token]) -> None:
    """Put SUBJECT before the list at the end of `done`, cut off from a list before it where there is one."""
    end = len(done)
    while end and done[end - 1].type in ("MUST", "NOT"):
        end -= 1
    start = end
    while start and done[start - 1].type in NAMED | {"AND"}:
        start -= 1
    if start == end:
        return
    head = done[start - 1].type if start else "SEP"
    if head in ("PROTECT", "KEEP", "LEAVE", "WHY", "FORGET"):
        return
    if head not in (
        "SEP",
        "MUST",
    ):  # "merge a and b, c must not drop": only what comes after the last comma, else the last "and"
        joints = [place for place in range(start, end) if done[place].type == "AND"]
        commas = [place for place in joints if str(done[place]) == ","]
        if not joints:
            return
        cut = (commas or joints)[-1]
        done[cut] = Token("SEP", str(done[cut]))
        start = cut + 1
    done.insert(start, Token("SUBJECT", ""))


def said_by(tokens: Iterable[Any]) -> str:
    """Return tokens as they were said."""
    return " ".join(str(one) for one in tokens if str(one))
