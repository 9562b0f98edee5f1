"""``python -m composer.cli``."""

from composer.cli import main

main()
