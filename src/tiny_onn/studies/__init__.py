"""Claims put to the test over several seeds: one module per ``tiny-onn study`` command."""
