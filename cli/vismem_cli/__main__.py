"""``python -m vismem_cli`` is ``vismem``."""

from . import main

main()
