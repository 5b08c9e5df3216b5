"""Leaves Python while it is imported."""

import sys

sys.exit("nothing to do here")
