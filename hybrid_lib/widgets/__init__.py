"""The explorer and the playground; both need the extra ``study``."""

import hybrid_lib.study  # noqa: F401  explains a missing extra
