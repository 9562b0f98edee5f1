"""The grammar at work: tokens in, clauses out; what fits nowhere is skipped and said."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, cast

from lark import Lark, Token, Tree
from lark.exceptions import UnexpectedInput, UnexpectedToken
from lark.lexer import Lexer

from composer.chat.scanner import Scan, scan
from composer.chat.words import clean

HARMLESS = frozenset(
    {"WORD", "QUOTED", "PATH", "NUMBER", "STAY", "SPLIT", "NOUN", "ALSO", "ALIKE", "OUTWORD", "ROUTER", "TOGETHER"}
)
"""Tokens that may be passed over: they change nothing by themselves."""
GRAMMAR = Path(__file__).with_name("language.lark")


@dataclass
class Heard:
    """A message as the language has it."""

    clauses: list[Tree[Token]] = field(default_factory=list)
    """One per wish; a clause's name is that of its rule in the grammar."""
    skipped: list[str] = field(default_factory=list)
    """Words that fit nowhere."""
    lost: list[str] = field(default_factory=list)
    """Those of them that mean something elsewhere (verbs, names, "not"): without them, something else may have been
    heard than was meant."""
    corrected: dict[str, str] = field(default_factory=dict)
    """Words with slips of the pen, and what they were taken for."""


class _Scanned(Lexer):
    """Hands on tokens that the scanner has made; asked again after an error, it goes on where it was."""

    def __init__(self, lexer_conf: Any) -> None:
        """Take the grammar's own, and need none of it."""

    def lex(self, data: Any) -> Iterator[Token]:  # type: ignore[override]
        """Return the tokens, an iterator already."""
        return iter(data)


@cache
def grammar() -> Lark:
    """Return the parser; made once, in about 0.1 s."""
    return Lark(GRAMMAR.read_text(), parser="lalr", lexer=_Scanned)


def hear(message: str, known: Sequence[str]) -> Heard:
    """Parse a message.

    Args:
        message: As it came.
        known: Names of models and tasks.

    Raises:
        RecipeError: if it is too long.
    """
    scanned: Scan = scan(clean(message), known)
    heard = Heard(corrected=scanned.corrected)

    def skip(error: UnexpectedInput) -> bool:
        if not _goes_on(error):
            return False
        token = cast("UnexpectedToken", error).token
        heard.skipped.append(str(token))
        if token.type not in HARMLESS:
            heard.lost.append(str(token))
        return True

    try:
        tree = grammar().parse(iter(scanned.tokens), on_error=skip)  # type: ignore[arg-type]
    except UnexpectedInput:  # it ends in the middle of a clause: what came before stands
        whole = _whole(scanned.tokens)
        heard.skipped, heard.lost = [], [str(token) for token in scanned.tokens[len(whole) :] if str(token)]
        heard.skipped += heard.lost
        tree = grammar().parse(iter(whole), on_error=skip)  # type: ignore[arg-type]
    heard.clauses = [one for one in tree.children if isinstance(one, Tree)]
    return heard


def _whole(tokens: list[Token]) -> list[Token]:
    """Return tokens without the fewest at the end that leave a clause open."""
    for count in range(len(tokens) - 1, 0, -1):
        try:
            grammar().parse(iter(tokens[:count]), on_error=_goes_on)  # type: ignore[arg-type]
        except UnexpectedInput:
            continue
        return tokens[:count]
    return []


def _goes_on(error: UnexpectedInput) -> bool:
    return isinstance(error, UnexpectedToken) and error.token.type != "$END"
