"""Serving: one OpenAI-compatible endpoint over one engine per expert.

Door: `composer.serving.server.Server`, a context manager. (Not imported here: recipes need the names of engines
without what it takes to run them.)
"""
