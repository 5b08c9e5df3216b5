"""A package of the plugin's own."""
