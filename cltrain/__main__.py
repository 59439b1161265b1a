"""python -m cltrain"""

from cltrain.cli import main

main()
