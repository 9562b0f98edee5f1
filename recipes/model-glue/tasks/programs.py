"""How a program is made of what a model writes."""


def completed(answers: list[list[str]], documents: list[dict[str, str]]) -> list[list[str]]:
    """Put the prompt, which is the beginning of the program, before every answer."""
    return [[document["prompt"] + one for one in own] for own, document in zip(answers, documents, strict=True)]
