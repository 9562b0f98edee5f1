"""The tools of a conversation: few, typed, the same for whatever drives it."""

from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter

from composer.chat.edit import Edit
from composer.value import Value


class ListModels(Value):
    """List the models and tasks there are."""

    tool: Literal["list_models"] = "list_models"


class InspectModel(Value):
    """Say what models are, from their headers."""

    tool: Literal["inspect_model"] = "inspect_model"
    models: tuple[str, ...] = Field(min_length=1, description="Ids.")


class CompareModels(Value):
    """Say how similar models are, and which may be merged."""

    tool: Literal["compare_models"] = "compare_models"
    models: tuple[str, ...] = Field(default=(), description="Ids; all of the draft where none are given.")


class DraftRecipe(Value):
    """Draft a recipe or change the draft; its plan is shown and waits for a yes."""

    tool: Literal["draft"] = "draft"
    edit: Edit


class PlanDraft(Value):
    """Show what running the draft would do and cost; with an edit, what it would with that, and nothing is changed."""

    tool: Literal["plan"] = "plan"
    edit: Edit = Edit()


class RunDraft(Value):
    """Compose what the draft says, once the person has agreed to its plan."""

    tool: Literal["run"] = "run"


class RewriteDraft(Value):
    """Replace the draft by a whole recipe, written as YAML; its plan is shown and waits for a yes."""

    tool: Literal["rewrite"] = "rewrite"
    text: str = Field(max_length=200_000, description="A recipe of models of the shelf.")


class ShowDraft(Value):
    """Show the recipe as it stands."""

    tool: Literal["show_draft"] = "show_draft"


class Status(Value):
    """Say what is running, what is served and what has been run."""

    tool: Literal["status"] = "status"


class Cancel(Value):
    """Stop the run that is going on; it carries on from there when it is run again."""

    tool: Literal["cancel"] = "cancel"


class Serve(Value):
    """Bring up the endpoint of the last composite."""

    tool: Literal["serve"] = "serve"


class Stop(Value):
    """Take the endpoint down."""

    tool: Literal["stop"] = "stop"


class Route(Value):
    """Say which expert of the last composite a prompt goes to."""

    tool: Literal["route"] = "route"
    prompt: str = Field(max_length=4000)


class Explain(Value):
    """Say why a model is an expert, was merged, or was left out; without a model, what was decided about all."""

    tool: Literal["explain"] = "explain"
    model: str | None = None


class ShowEvidence(Value):
    """Show what the last composite gained."""

    tool: Literal["evidence"] = "evidence"


class Save(Value):
    """Write the draft as a recipe file that runs alone."""

    tool: Literal["save"] = "save"
    file: str | None = Field(default=None, description="A plain file name, ending in .yaml.")


class Undo(Value):
    """Take back the last change of the draft."""

    tool: Literal["undo"] = "undo"


class RollBack(Value):
    """Go back to the composite before the last one."""

    tool: Literal["roll_back"] = "roll_back"


class Help(Value):
    """Say what can be asked for."""

    tool: Literal["help"] = "help"


Call = Annotated[
    ListModels
    | InspectModel
    | CompareModels
    | DraftRecipe
    | PlanDraft
    | RunDraft
    | RewriteDraft
    | ShowDraft
    | Status
    | Cancel
    | Serve
    | Stop
    | Route
    | Explain
    | ShowEvidence
    | Save
    | Undo
    | RollBack
    | Help,
    Field(discriminator="tool"),
]
CALL: TypeAdapter[Call] = TypeAdapter(Call)
TOOLS: dict[str, type[Value]] = {
    kind.model_fields["tool"].default: kind
    for kind in (
        ListModels, InspectModel, CompareModels, DraftRecipe, PlanDraft, RunDraft, RewriteDraft, ShowDraft, Status,
        Cancel, Serve, Stop, Route, Explain, ShowEvidence, Save, Undo, RollBack, Help,
    )
}  # fmt: skip
"""All tools by name."""


def described() -> list[dict[str, Any]]:
    """Return the tools as OpenAI-compatible endpoints are told of them."""
    listed = []
    for name, kind in TOOLS.items():
        schema = kind.model_json_schema()
        schema["properties"].pop("tool", None)
        summary = (kind.__doc__ or "").strip()
        listed.append({"type": "function", "function": {"name": name, "description": summary, "parameters": schema}})
    return listed


class Question(Value):
    """Something that is asked back."""

    text: str
    word: str | None = None
    """What was said and could be several things."""
    options: tuple[str, ...] = ()
    """What it may be."""
    said: str = ""
    """The request that it is about."""
    join: str = "{said}. {answer}"
    """How an answer makes a whole request of it."""


class Understood(Value):
    """What a driver makes of a message: calls, or a question, or a refusal."""

    calls: tuple[Call, ...] = ()
    question: Question | None = None
    refusal: str | None = None
    notes: tuple[str, ...] = ()
    """What was corrected, supposed or not understood."""
    text: str | None = None
    """What the driver says itself."""
