"""`python -m dsmoe_lite` is the `dsmoe` command. It works even if the path of the environment breaks scripts."""

from dsmoe_lite.cli import main

main()
