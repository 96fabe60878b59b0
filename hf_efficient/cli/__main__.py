"""`python -m hf_efficient.cli`"""

from hf_efficient.cli.app import main

main()
