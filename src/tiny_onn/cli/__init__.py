"""The ``tiny-onn`` command, one file per sub-command."""
