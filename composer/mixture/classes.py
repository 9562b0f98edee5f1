"""The model classes of mixtures that transformers does not have, told to it before they are loaded."""

CLASSES = ("BlockMixtureForCausalLM", "ModelMixtureForCausalLM")
"""As `architectures` of a config.json names them."""


def register() -> tuple[type, ...]:
    """Tell transformers of all of them, and return them; a second call changes nothing."""
    from composer.mixture import blocks, fusion

    blocks.register()
    fusion.register()
    return blocks.BlockMixtureForCausalLM, fusion.ModelMixtureForCausalLM
