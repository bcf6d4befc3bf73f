"""``python -m lit_instruct`` is ``lit-instruct``: for torchrun, which starts modules."""

from lit_instruct.cli import main

main()
