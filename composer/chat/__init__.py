"""Composition in plain words: from what a person says to a recipe, and from a run to an answer.

Doors: `shelf.open_shelf`, `builtin.BuiltIn` and `endpoint.Endpoint` (drivers), `draft.changed`, `tools.Desk`. The
conversation itself is a graph, `graphs/chat.py`. Nothing here imports torch before a plan is made.
"""
