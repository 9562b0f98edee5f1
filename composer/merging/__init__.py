"""Merging: from a plan for one cluster to one merged checkpoint, or the reason why not.

Door: `composer.merging.merge.merge_cluster`. (Not imported here: recipes need the names of operators and
strategies without what it takes to run them.)
"""
