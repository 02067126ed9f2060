"""``python -m hybrid_lib.study``: see :mod:`hybrid_lib.study.planning`."""

import sys

from hybrid_lib.study.planning import main

sys.exit(main())
