"""The state machines. Nodes are thin: each calls one door of `composer` and notes where the result is."""
