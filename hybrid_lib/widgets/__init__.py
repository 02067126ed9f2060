"""The explorer and the playground. Needs what the extra ``study`` installs."""

import hybrid_lib.study  # noqa: F401  says so where it is missing
