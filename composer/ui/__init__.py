"""The page: a conversation in a browser, beside what it is about.

Door: `composer.ui.server.serve`. `work.py` does what is said, whoever looks on; `stages.py`, `views.py` and
`playground.py` turn runs, zoos and endpoints into what is shown; `page.py` is the layout. All text that comes from
elsewhere (model cards, names, what was said) reaches the browser as text, never as markup.
"""
