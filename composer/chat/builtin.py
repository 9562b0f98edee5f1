"""The built-in driver: requests in the documented language to tool calls, the same every time, with no model."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from lark import Token, Tree

from composer.chat import calls
from composer.chat.calls import Question, Understood
from composer.chat.draft import TRIES, Draft, changed
from composer.chat.edit import Edit
from composer.chat.language import Heard, hear
from composer.chat.names import matching, nearest_names, parts
from composer.chat.shelf import Shelf
from composer.errors import ComposerError, RecipeError
from composer.merging.operators import OPERATORS
from composer.merging.strategies import STRATEGIES

LIST_AT_MOST = 8
TWICE = 2.0
"""How much a task counts that "matters most"."""
ORDERS: dict[str, Callable[[], Any]] = {
    "models": calls.ListModels,
    "status": calls.Status,
    "cancel": calls.Cancel,
    "halt": calls.Stop,
    "evidence": calls.ShowEvidence,
    "recipe": calls.ShowDraft,
    "undo": calls.Undo,
    "rollback": calls.RollBack,
    "help": calls.Help,
    "plan": calls.PlanDraft,
    "run": calls.RunDraft,
}
"""Clauses that are a call without arguments."""


class _AskError(Exception):
    """Something has to be asked back."""

    def __init__(self, question: Question) -> None:
        super().__init__(question.text)
        self.question = question


class BuiltIn:
    """Understands the documented language of requests."""

    def understand(self, said: str, draft: Draft, shelf: Shelf, question: Question | None = None) -> Understood:
        """Turn a message into calls.

        Args:
            said: The message.
            draft: What there is so far.
            shelf: What may be named.
            question: What was asked last, if the message may be the answer.
        """
        try:
            if question is not None:
                answered = _answered(said, question, draft, shelf)
                if answered is not None:
                    return answered
            return _understood(said, draft, shelf, {})
        except ComposerError as error:
            return Understood(refusal=str(error))


def _answered(said: str, question: Question, draft: Draft, shelf: Shelf) -> Understood | None:
    """Return what an answer makes of the request it was asked about, or None if it is none."""
    heard = hear(said, (*shelf.models, *shelf.tasks))
    plain = {"mention", "method", "minutes", "size", "tries", "items", "memory", "disk", "level"}
    if not heard.clauses or any(clause.data not in plain for clause in heard.clauses):
        return None
    if question.word is None:
        return _understood(question.join.format(said=question.said, answer=said), draft, shelf, {})
    chosen: list[str] = []
    for token in _tokens(heard.clauses):
        if token.type == "ALL":
            chosen += question.options
        elif token.type in ("NAME", "GROUP", "WORD"):
            found = matching(str(token), question.options) or matching(str(token), (*shelf.models, *shelf.tasks))
            if not found or (len(found) > 1 and token.type != "GROUP"):
                return None
            chosen += found
    return _understood(question.said, draft, shelf, {question.word: tuple(chosen)}) if chosen else None


def _tokens(clauses: list[Tree[Token]]) -> list[Token]:
    return [token for clause in clauses for token in clause.scan_values(lambda one: isinstance(one, Token))]


def _understood(said: str, draft: Draft, shelf: Shelf, bound: dict[str, tuple[str, ...]]) -> Understood:
    heard = hear(said, (*shelf.models, *shelf.tasks))
    paths = [word for word in heard.skipped if "/" in word or "\\" in word]
    if paths:
        raise RecipeError(_outside(paths[0]))
    notes = _notes(heard)
    if heard.lost:
        text = f"I am not sure what {' '.join(map(repr, heard.lost))} means there; can you say it another way?"
        return Understood(question=Question(text=text, said=said, join="{answer}"), notes=notes)
    if heard.skipped and {str(clause.data) for clause in heard.clauses} == {"mention"}:
        text = f"what is to be done with them? I did not understand {', '.join(map(repr, heard.skipped))}"
        return Understood(question=Question(text=text, said=said, join="{answer}"))
    listening = _Listening(said, draft, shelf, bound)
    try:
        for clause in heard.clauses:
            listening.take(clause)
        made = listening.calls()
        for call in made:
            if isinstance(call, calls.DraftRecipe):
                changed(draft, call.edit, shelf)  # what cannot be is refused before anything else is done
    except _AskError as ask:
        return Understood(question=ask.question, notes=notes)
    if not made:
        text = "I did not understand that. Say for example 'merge MODEL and MODEL', 'leave out MODEL', or 'help'"
        return Understood(question=Question(text=text, said=said, join="{answer}"), notes=notes)
    return Understood(calls=tuple(made), notes=notes)


def _notes(heard: Heard) -> tuple[str, ...]:
    slips = [f"'{written}' as '{meant}'" for written, meant in heard.corrected.items()]
    notes = [f"I read {', '.join(slips)}"] if slips else []
    if heard.skipped:
        notes.append(f"I did not understand: {', '.join(repr(word) for word in heard.skipped)}")
    return tuple(notes)


def _outside(path: str) -> str:
    return (
        f"'{path}' is not on the shelf; only models and tasks of the zoo can be named, by their ids ('list' shows them)"
    )


@dataclass
class _Listening:
    """Gathers the clauses of one message into one edit and the calls beside it."""

    said: str
    draft: Draft
    shelf: Shelf
    bound: dict[str, tuple[str, ...]]
    values: dict[str, Any] = field(default_factory=dict)
    lists: dict[str, list[str]] = field(default_factory=dict)
    orders: list[Any] = field(default_factory=list)
    hypothetical: bool = False
    merging: bool = False
    grouped: set[str] = field(default_factory=set)
    """Models that were named as one of a group; leaving one of a group out is no contradiction."""

    def take(self, clause: Tree[Token]) -> None:
        """Take in one clause."""
        kind = str(clause.data)
        if kind in ORDERS:
            self.orders.append(ORDERS[kind]())
        else:
            getattr(self, f"_{kind}")(clause)

    def calls(self) -> list[Any]:
        """Return what is to be done."""
        self._weigh()
        edit = self._edit()
        if self.hypothetical:
            return [calls.PlanDraft(edit=edit)]
        made = list(self.orders)
        if not edit.empty or self.merging:
            place = next(
                (i for i, one in enumerate(made) if one.tool in ("plan", "run", "save", "show_draft")), len(made)
            )
            made.insert(place, calls.DraftRecipe(edit=edit))
        elif self.values.get("serve") is True:
            made.append(calls.Serve())
        return made

    def _weigh(self) -> None:
        """Refuse or ask where the clauses together do not make sense."""
        if self.values.get("nothing") and (self.lists.get("models") or self.values.get("strategy")):
            raise RecipeError("'merge nothing' and a merge stand against each other; which of the two?")
        if "over" in self.values:
            least = self.values["over"]
            if "max_parameters" in self.values:
                most = self.values["max_parameters"]
                raise RecipeError(
                    f"'at least {least:,} parameters' and 'at most {most:,}' stand against each other; which one?"
                )
            raise RecipeError(
                f"a composite can be bounded from above only, not to at least {least:,} parameters: what it holds "
                "follows from which models belong together"
            )
        strategy = self.values.get("strategy", self.draft.document.get("merge", {}).get("strategy", "simmerge"))
        if "tries" in self.values and strategy not in TRIES:
            raise _AskError(
                Question(
                    text=f"strategy {strategy} tries all there is to try and has no number of tries; with which one? "
                    f"{', '.join(TRIES)} have one",
                    options=tuple(TRIES),
                    said=self.said,
                )
            )

    def _edit(self) -> Edit:
        values = {key: value for key, value in self.values.items() if key in Edit.model_fields}
        if self.values.get("nothing"):
            values["strategy"] = "none"
        lists: dict[str, Any] = {key: tuple(dict.fromkeys(value)) for key, value in self.lists.items()}
        mentioned = lists.pop("mentioned", ())
        if mentioned and "models" in lists:
            lists["models"] = tuple(dict.fromkeys((*lists["models"], *mentioned)))
        elif mentioned:
            lists["models"] = mentioned
        if "models" in lists:
            spared = self.grouped & set(lists.get("leave_out", ()))
            lists["models"] = tuple(name for name in lists["models"] if name not in spared)
        if self.merging and "models" in lists and len(lists["models"]) == 1 and not lists.get("whole"):
            one = lists["models"][0]
            raise _AskError(Question(text=f"merge {one} with which other model?", said=self.said))
        return Edit.model_validate({**values, **lists})

    # --- names

    def _names(self, clause: Tree[Token], role: str = "model") -> list[str]:
        """Return the models or tasks that a clause lists."""
        found: list[str] = []
        lists = [one for one in clause.children if isinstance(one, Tree) and one.data in ("names", "listed")]
        for token in (token for one in lists for token in one.children if isinstance(token, Token)):
            found += self._one(token, role) if token.type != "AND" else []
        return list(dict.fromkeys(found))

    def _one(self, token: Token, role: str) -> tuple[str, ...]:
        said = str(token)
        known = self.shelf.models if role == "model" else self.shelf.tasks
        if said in self.bound:
            return self.bound[said]
        if token.type == "ALL" and said.lower() == "both":
            return self._both(role)
        if token.type == "ALL":
            everything = self._everything(role, said)
            self.grouped |= set(everything)
            return everything
        if token.type == "SIZED":
            return self._of_size(token.value)
        if token.type in ("SOME", "DOUBTFUL"):
            text = f"which ones? '{said}' could be any of {_few(known)}"
            raise _AskError(Question(text=text, word=said, options=known, said=self.said))
        if token.type == "PATH":
            raise RecipeError(_outside(said))
        found = matching(said, known) if role == "model" else self.shelf.task(said)
        if len(found) > 1 and token.type == "GROUP":
            self.grouped |= set(found)
            return found
        if len(found) == 1:
            return found
        if found:
            text = f"which one is '{said}': {_few(found)}?"
            raise _AskError(Question(text=text, word=said, options=found, said=self.said))
        near = nearest_names(said, known) if role == "model" else self.shelf.nearest_tasks(said)
        raise _AskError(
            Question(
                text=f"there is no {role} '{said}'; the nearest are {_few(near)} (there are: {_few(known, 20)})",
                word=said,
                options=near,
                said=self.said,
            )
        )

    def _everything(self, role: str, said: str) -> tuple[str, ...]:
        if role != "model":
            return self.draft.tasks
        return (
            self.draft.models
            if said.lower() in ("them all", "the rest", "the others", "all others")
            else self.shelf.models
        )

    def _both(self, role: str) -> tuple[str, ...]:
        """Return the two that were named before: in this message, else in the draft."""
        named = tuple(dict.fromkeys(self.lists.get("models", ()))) or self.draft.models
        found = named
        if role == "task":
            tasks = [task for name in named for part in parts(name) for task in self.shelf.task(part)]
            found = tuple(dict.fromkeys(task for task in tasks if task in self.shelf.tasks))
        if len(found) != 2:
            raise _AskError(Question(text=f"which two {role}s?", word="both", said=self.said))
        return found

    def _of_size(self, size: float) -> tuple[str, ...]:
        known = self.shelf.parameters(self.shelf.models)
        found = tuple(name for name, count in known.items() if abs(count - size) <= 0.2 * size)
        if not found:
            sizes = ", ".join(f"{name} {count:,}" for name, count in known.items())
            raise RecipeError(f"no model has about {size:,.0f} parameters; there are: {sizes}")
        return found

    # --- clauses

    def _set(self, key: str, value: Any, what: str) -> None:
        if key in self.values and self.values[key] != value:
            first = self.values[key]
            raise RecipeError(f"'{what} {first}' and '{what} {value}' stand against each other; which of the two?")
        self.values[key] = value

    def _more(self, key: str, names: list[str]) -> None:
        self.lists.setdefault(key, []).extend(names)

    def _merge(self, clause: Tree[Token]) -> None:
        self.merging = True
        if any(isinstance(one, Tree) for one in clause.children):
            self._more("models", self._names(clause))

    def _only(self, clause: Tree[Token]) -> None:
        self._more("models", self._names(clause))

    def _mention(self, clause: Tree[Token]) -> None:
        self._more("mentioned", self._names(clause))
        self.merging = self.merging or any(token.type == "ALL" for token in _tokens([clause]))

    def _nothing(self, clause: Tree[Token]) -> None:
        self.values["nothing"] = True
        names = self._names(clause)
        if names:
            self._more("whole", names)

    def _out(self, clause: Tree[Token]) -> None:
        names = self._names(clause)
        if not names:
            raise _AskError(Question(text="leave out which model?", said=self.said, join="leave out {answer}"))
        self._more("leave_out", names)

    def _add(self, clause: Tree[Token]) -> None:
        self._more("add", self._names(clause))

    def _whole(self, clause: Tree[Token]) -> None:
        names = self._names(clause)
        left_out = any(token.type == "OUTWORD" for token in clause.children if isinstance(token, Token))
        if not names:
            raise _AskError(Question(text="keep which model whole?", said=self.said, join="keep {answer} whole"))
        if set(names) == set(self.shelf.models):
            self.values["nothing"] = True
        else:
            self._more("leave_out" if left_out else "whole", names)

    def _method(self, clause: Tree[Token]) -> None:
        for token in _tokens([clause]):
            if token.type != "METHOD":
                continue
            name = str(token.value)
            if name in STRATEGIES.names() and not (name == "average" and self.values.get("strategy")):
                self._set("strategy", name, "strategy")
            elif name in OPERATORS.names():
                self._more("operators", [name])

    def _router(self, clause: Tree[Token]) -> None:
        for token in _tokens([clause]):
            if token.type == "KIND":
                self._set("router", str(token.value), "router")
            elif token.type == "PACE":
                pace = {"quick": "fast", "fastest": "fast"}.get(str(token).lower(), str(token).lower())
                self._set("preset", pace, "router preset")

    def _level(self, clause: Tree[Token]) -> None:
        self._set("level", str(_first(clause, "LEVEL").value), "level")

    def _signal(self, clause: Tree[Token]) -> None:
        self._set("signal", str(_first(clause, "SIGNAL").value), "compare by")

    def _threshold(self, clause: Tree[Token]) -> None:
        value = _first(clause, "NUMBER", "PERCENT").value
        self._set("threshold", float(value), "threshold")

    def _accept(self, clause: Tree[Token]) -> None:
        self._set("accept", "always", "accept")

    def _seed(self, clause: Tree[Token]) -> None:
        self._set("seed", int(_first(clause, "NUMBER").value), "seed")

    def _name(self, clause: Tree[Token]) -> None:
        self._set("name", str(_first(clause, "NAME", "WORD", "QUOTED")), "call it")

    def _vague(self, clause: Tree[Token]) -> None:
        word = str(_first(clause, "VAGUE"))
        noun = next((str(one) for one in _tokens([clause]) if one.type == "NOUN"), None)
        if noun and noun.startswith("operator"):
            raise _AskError(
                Question(text=f"which operator? {_few(OPERATORS.names(), 30)}", said=self.said, join="{answer}")
            )
        if noun:
            raise _AskError(
                Question(text=f"which strategy? {_few(STRATEGIES.names(), 30)}", said=self.said, join="{answer}")
            )
        small = word in ("small", "tiny", "light", "cheap", "big", "large", "smaller", "bigger", "smallest", "cheaper")
        how = (
            "how many parameters at most, e.g. 'under 200M'"
            if small
            else ("in which way? e.g. 'make sure TASK does not drop', 'use evolution', 'under 200M', 'a fast router'")
        )
        raise _AskError(Question(text=f"'{word}' can be many things: {how}?", said=self.said, join="{answer}"))

    def _swap(self, clause: Tree[Token]) -> None:
        names = self._names(clause)
        if len(names) != 2:
            raise _AskError(Question(text="swap which model for which? e.g. 'swap MODEL for MODEL'", said=self.said))
        self._more("leave_out", names[:1])
        self._more("add", names[1:])

    def _protect(self, clause: Tree[Token]) -> None:
        names = self._names(clause, "task")
        if not names and not self.lists.get("protect"):
            options = self.draft.tasks or self.shelf.tasks
            text = f"which task must not drop? {_few(options, 12)}"
            raise _AskError(Question(text=text, said=self.said, join="{said}, protect {answer}"))
        self._more("protect", names)

    def _held(self, clause: Tree[Token]) -> None:
        self._protect(clause)

    def _prefer(self, clause: Tree[Token]) -> None:
        tokens = _tokens([clause])
        if any(token.type == "EQUALLY" for token in tokens):
            self._more("forget", ["weights"])
            return
        even = next((str(token) for token in tokens if str(token).lower() in ("as important", "as much as")), None)
        if even and not any(token.type == "TIMES" for token in tokens):
            raise _AskError(
                Question(text=f"'{even}' weighs both the same; which one is to count more, and how many times?")
            )
        times = next((float(token.value) for token in tokens if token.type in ("TIMES", "NUMBER")), TWICE)
        preferred, *others = [one for one in clause.children if isinstance(one, Tree)]
        weights = self.values.setdefault("weights", {})
        for names, weight in ((preferred, times), *((one, 1.0) for one in others)):
            found = self._names(Tree("prefer", [names]), "task")
            weights |= {task: weight for task in found if weight == times or task not in weights}

    def _evaluate(self, clause: Tree[Token]) -> None:
        also = any(token.type == "ALSO" for token in _tokens([clause]))
        adding = str(_first(clause, "EVALUATE")).lower().startswith("add")
        self._more("add_tasks" if also or adding else "tasks", self._names(clause, "task"))

    def _size(self, clause: Tree[Token]) -> None:
        self._set("max_parameters", round(_first(clause, "SIZE").value), "parameters at most")

    def _least(self, clause: Tree[Token]) -> None:
        self.values["over"] = round(_first(clause, "SIZE").value)

    def _minutes(self, clause: Tree[Token]) -> None:
        self._set("minutes", float(_first(clause, "TIME").value), "minutes")

    def _memory(self, clause: Tree[Token]) -> None:
        self._set("memory_gb", float(_first(clause, "MEMORY").value), "GB of RAM")

    def _disk(self, clause: Tree[Token]) -> None:
        self._set("disk_gb", float(_first(clause, "DISK").value), "GB of disk")

    def _tries(self, clause: Tree[Token]) -> None:
        self._set("tries", round(_first(clause, "NUMBER").value), "tries")

    def _items(self, clause: Tree[Token]) -> None:
        count = round(_first(clause, "NUMBER").value)
        split = next((str(one).lower() for one in _tokens([clause]) if one.type == "SPLIT"), "")
        if split != "proxy":
            self._set("held_out_items", count, "held-out items")
        if split in ("proxy", ""):
            self._set("proxy_items", count, "proxy items")

    def _forget(self, clause: Tree[Token]) -> None:
        tokens = _tokens([clause])
        if any(token.type == "ALWAYS" for token in tokens):
            self._set("accept", "proxy", "accept")
        for token in tokens:
            if token.type == "LIMIT":
                words = {"item": "items", "priorities": "weights", "weights": "weights"}
                named = next(
                    (one for one in ("size", "time", "memory", "disk", *words) if one in str(token).lower()), "all"
                )
                self._more("forget", [words.get(named, named)])
        guarded = self.draft.document.get("merge", {}).get("protect", [])
        lists = [one for one in clause.children if isinstance(one, Tree)]
        for token in (one for tree in lists for one in tree.children if isinstance(one, Token)):
            if token.type == "ALL":
                self._more("forget", ["all"])
            elif token.type != "AND":
                held = matching(str(token), guarded)
                self._more("unprotect" if held else "leave_out", list(held) or list(self._one(token, "model")))
        guarding = any(token.type == "PROTECT" or "protect" in str(token).lower() for token in tokens)
        if guarding and not lists:
            self._more("forget", ["protect"])
        elif len(tokens) == 1:
            self.orders.append(calls.ShowDraft())

    def _serve(self, clause: Tree[Token]) -> None:
        self._set_serve(wanted=True)
        number = next((token for token in _tokens([clause]) if token.type == "NUMBER"), None)
        if number is not None:
            self._set("port", round(number.value), "port")

    def _unserve(self, clause: Tree[Token]) -> None:
        self._set_serve(wanted=False)

    def _set_serve(self, *, wanted: bool) -> None:
        if self.values.get("serve", wanted) != wanted:
            raise RecipeError("'serve it' and 'do not serve it' stand against each other; which of the two?")
        self.values["serve"] = wanted

    def _port(self, clause: Tree[Token]) -> None:
        self._set("port", round(_first(clause, "NUMBER").value), "port")

    def _engine(self, clause: Tree[Token]) -> None:
        self._set("engine", str(_first(clause, "ENGINE").value), "engine")

    def _inspect(self, clause: Tree[Token]) -> None:
        names = self._names(clause)
        self.orders.append(calls.InspectModel(models=tuple(names)) if names else calls.ListModels())

    def _compare(self, clause: Tree[Token]) -> None:
        self.orders.append(calls.CompareModels(models=tuple(self._names(clause))))

    def _route(self, clause: Tree[Token]) -> None:
        prompt = " ".join(str(token) for token in _tokens([clause]) if token.type != "ROUTE")
        if not prompt:
            raise _AskError(Question(text="route which prompt?", said=self.said, join='route "{answer}"'))
        self.orders.append(calls.Route(prompt=prompt))

    def _why(self, clause: Tree[Token]) -> None:
        names = self._names(clause)
        self.orders += [calls.Explain(model=name) for name in names] or [calls.Explain()]

    def _cost(self, clause: Tree[Token]) -> None:
        self.hypothetical = True

    def _save(self, clause: Tree[Token]) -> None:
        file = next((str(one) for one in _tokens([clause]) if one.type in ("PATH", "WORD", "NAME", "QUOTED")), None)
        if file is not None and ("/" in file or "\\" in file or file.startswith(("~", "."))):
            raise RecipeError(
                f"'{file}': recipes are saved beside you under a plain file name, e.g. 'save as mine.yaml'"
            )
        self.orders.append(calls.Save(file=file))

    def _reset(self, clause: Tree[Token]) -> None:
        self.values["fresh"] = True

    def _train(self, clause: Tree[Token]) -> None:
        raise RecipeError(
            f"'{_first(clause, 'TRAIN')}' is not done here: a composite is made of checkpoints as they are"
        )


def _first(clause: Tree[Token], *kinds: str) -> Token:
    return next(token for token in _tokens([clause]) if token.type in kinds)


def _few(names: Any, most: int = LIST_AT_MOST) -> str:
    listed = list(names)
    return ", ".join(listed[:most]) + (f" and {len(listed) - most} more" if len(listed) > most else "")
