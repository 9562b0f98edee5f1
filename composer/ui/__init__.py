"""The page: a conversation in a browser, beside what it is about.

Door: `composer.ui.server.serve`. `work.py` does what is said, whoever looks on; `stages.py`, `views.py` and `asking.py`
turn runs, zoos and endpoints into what is shown; `page.py` lays it out, in `chat.py` and `side.py` (with `graph.py`,
`editor.py`, `playground.py`). All text that comes from elsewhere (model cards, names, what was said) reaches the
browser as text, never as markup.
"""
