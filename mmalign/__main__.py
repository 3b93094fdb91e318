"""`python -m mmalign` is the console command."""

from __future__ import annotations

import sys

from mmalign.cli import main

sys.exit(main())
