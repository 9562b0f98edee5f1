"""``transformers`` with our own model classes in it: run as a module, with the arguments of its command line."""

import runpy

from composer.mixture.classes import register

if __name__ == "__main__":
    import transformers

    for one in register():
        # `transformers serve` looks up what a config.json calls its architecture among transformers' own names.
        setattr(transformers, one.__name__, one)
    runpy.run_module("transformers.cli.transformers", run_name="__main__", alter_sys=True)
