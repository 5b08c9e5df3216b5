"""A package of the plugin's own; `forgotten` is not in it."""

import detection.forgotten
