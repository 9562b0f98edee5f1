"""The model card of a composite."""

from composer.mixture.composite import Composite
from composer.mixture.licences import licence_notes
from routers import RouterManifest


def model_card(composite: Composite) -> str:
    """Return a model card in Markdown: experts, lineage, licences, routing."""
    licences = {name: licence for expert in composite.experts for name, licence in expert.licences.items()}
    stated = sorted({licence or "not stated" for licence in licences.values()})
    least, most = composite.active
    lines = [
        "---",
        "library_name: model-composer",
        "tags: [merge, mixture-of-experts, model-composer]",
        "---",
        "",
        f"# {composite.name}",
        "",
        f"A mixture of {len(composite.experts)} whole models; one answers each prompt."
        if len(composite.experts) > 1
        else "A single model.",
        "",
        f"{composite.parameters:,} parameters in all; on one answer work {least:,}"
        f"{f' to {most:,}' if most > least else ''}.",
        "",
        "| expert | made of | operator | parameters | licence |",
        "|---|---|---|---|---|",
    ]
    for expert in composite.experts:
        lineage = expert.checkpoint.lineage
        lines.append(
            f"| {expert.id} | {', '.join(expert.members)} | {lineage.operator if lineage else 'none'} "
            f"| {expert.checkpoint.parameters:,} | {expert.checkpoint.licence or 'not stated'} |"
        )
    dequantised: dict[str, str] = {}
    for expert in composite.experts:
        dequantised |= expert.checkpoint.dequantised
    if dequantised:
        named = ", ".join(f"{name} (from {kind})" for name, kind in sorted(dequantised.items()))
        lines += ["", f"Made from models that had been quantised, and lost precision then: {named}."]
    lines += [
        "",
        f"Licences of the models in it: {', '.join(stated)}.",
        *[f"- {note}" for note in licence_notes(licences)],
    ]
    if composite.gates:
        gates = composite.gates
        lines += [
            "",
            "## Gates",
            "",
            f"Experts inside: {', '.join(gates.experts)}. Gates `{gates.kind}`, made of example requests; examples "
            f"that find their expert when left out, mean over layers: {_health(gates)}.",
            *[f"- warning: {warning}" for warning in gates.warnings],
        ]
    if composite.router:
        router = composite.router
        lines += [
            "",
            "## Routing",
            "",
            f"Router `{router.kind}`{f' on {router.encoder.in_words}' if router.encoder else ''}; what is unclear "
            f"goes to {router.policy.abstain_to}. Examples that find their expert when left out: {_health(router)}.",
            *[f"- warning: {warning}" for warning in router.warnings],
        ]
    if composite.left_out:
        lines += [
            "",
            "## Left out",
            "",
            *[f"- {name}: {reason}" for name, reason in composite.left_out.items()],
        ]
    return "\n".join(lines) + "\n"


def _health(manifest: RouterManifest) -> str:
    return f"{manifest.leave_one_out:.0%}" if manifest.leave_one_out is not None else "not measured"
